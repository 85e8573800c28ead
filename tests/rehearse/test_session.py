"""What is refused before anything starts, and the ranks that words name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.rehearse.grid import point
from toolkit.config.load import parse_config
from toolkit.errors import ConfigError, LayoutError, MachineError
from toolkit.hardware.catalogue import parse_hardware
from toolkit.parallel.layout import Layout
from toolkit.rehearse import guard
from toolkit.rehearse.session import RehearsalError, choose_ranks, prepare, refuse_errors

LAYOUT = Layout(tp=2, pp=4, dp=2)
POINT = point("llama-8b", tp=2, pp=4, dp=2, zero=1, recompute="none", precision="bf16", sp=True, vpp=1, stage=0)


def test_words_name_ranks() -> None:
    assert choose_ranks("stages", LAYOUT, worst=lambda: 0) == [0, 4, 8, 12]
    assert choose_ranks("worst", LAYOUT, worst=lambda: 3) == [12]
    assert choose_ranks("17,0,17", Layout(tp=8, pp=4), worst=lambda: 0) == [0, 17]
    assert choose_ranks("all", LAYOUT, worst=lambda: 0) == list(range(16))


@pytest.mark.parametrize("text", ["0,16", "-1", "some", ""])
def test_ranks_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--ranks"):
        choose_ranks(text, LAYOUT, worst=lambda: 0)


@pytest.mark.parametrize(
    ("section", "keys", "words"),
    [
        ("model", {"impl": "te"}, "Transformer Engine"),
        ("zero", {"stage": 3, "offload_optimizer": "nvme"}, "zero.nvme_path"),
        ("parallel", {"tp": 3}, "parallel.tp"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(section: str, keys: dict[str, Any], words: str) -> None:
    raw = {**POINT.raw, section: {**POINT.raw[section], **keys}}
    with pytest.raises(LayoutError, match=words):
        prepare(parse_config(raw), parse_hardware("h100-80gb:8x2"))


def test_a_run_loses_its_folders() -> None:
    raw = {**POINT.raw, "checkpoint": {"every": 5, "init_from": "weights"}, "log": {"tensorboard": True}}
    config, layout = prepare(parse_config(raw), parse_hardware("h100-80gb:8x2"))
    assert layout.world_size == 16
    assert (config.checkpoint.every, config.checkpoint.init_from, config.log.tensorboard) == (0, None, False)


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MachineError, match=r"no-such-compiler is not found.*Install g\+\+"):
        guard.ensure()


def test_a_failed_rank_is_named_with_its_line() -> None:
    trace = 'Traceback\n  File "toolkit/engine/zero.py", line 7, in finish\n  File "/x/torch/_ops.py", line 1, in f\nRuntimeError: cpu and cuda:0'
    with pytest.raises(RehearsalError, match=r"rank 3 .*cpu and cuda:0.*engine/zero.py.*line 7"):
        refuse_errors([{"rank": 0}, {"rank": 3, "error": "RuntimeError: cpu and cuda:0", "trace": trace}])
