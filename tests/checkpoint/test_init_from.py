"""checkpoint.init_from: a new run begins with another's weights, in any layout, and with nothing
else of it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.run import config_of
from tests.checkpoint.runs import Run, metrics, running, write_config
from tests.pool import Pool
from toolkit.checkpoint.start import starting_weights
from toolkit.config.load import load_config, parse_config
from toolkit.errors import CheckpointError

TRAIN = "tests.checkpoint.run:train"


@pytest.fixture(scope="module")
def trained(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A run of three steps on TP 2 x DP 2, and what a single process computes from its weights on."""
    folder = tmp_path_factory.mktemp("trained")
    pool.run(TRAIN, 4, config_of(folder / "run", {"parallel.tp": 2}, steps=3, checkpoint={"every": 3}), deadline_s=120)
    raw = config_of(folder / "alone", {"zero.stage": 0}, steps=2, checkpoint={"init_from": str(folder / "run")})
    alone = pool.run(TRAIN, 1, raw, deadline_s=120)[0]
    assert alone["first"] == 1
    return folder / "run", alone["losses"] + alone["norms"]


@pytest.mark.parametrize(
    "keys",
    [
        {"zero.stage": 3, "parallel.pp": 2},
        {"zero.stage": 2, "zero.offload_optimizer": "cpu"},
        {"zero.stage": 1, "parallel.tp": 2, "parallel.sequence_parallel": True},
    ],
    ids=str,
)
def test_any_layout(
    keys: dict[str, Any], trained: tuple[Path, list[float]], pool: Pool, tmp_path: Path, compiled: Callable[[dict[str, Any]], None]
) -> None:
    """Losses and norms of two steps: the second shows that moments are new, since old ones would
    move the weights elsewhere.
    """
    compiled(keys)
    run, expected = trained
    found = pool.run(TRAIN, 2, config_of(tmp_path, keys, steps=2, checkpoint={"init_from": str(run)}), deadline_s=120)[0]
    assert found["first"] == 1
    assert found["losses"] + found["norms"] == pytest.approx(expected, rel=1e-5)


def test_not_a_fresh_run_nor_a_resumed_one(trained: tuple[Path, list[float]], pool: Pool, tmp_path: Path) -> None:
    run, expected = trained
    fresh = pool.run(TRAIN, 1, config_of(tmp_path / "fresh", {"zero.stage": 0}, steps=2, checkpoint={}), deadline_s=120)[0]
    assert abs(fresh["losses"][0] - expected[0]) > 1e-3
    shutil.copytree(run, tmp_path / "copy")
    raw = config_of(tmp_path / "copy", {"parallel.tp": 2}, steps=5, checkpoint={"resume": "must", "init_from": str(run)})
    resumed = pool.run(TRAIN, 4, raw, deadline_s=120)[0]
    assert resumed["first"] == 4  # its own checkpoint comes first


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model.num_layers": 2}, "it has model.num_layers=4, and this run has model.num_layers=2: every tensor"),
        ({"model.vocab_size": 300}, "it has model.vocab_size=250, and this run has model.vocab_size=300"),
        ({"model.family": "gpt"}, "it has model.family=llama, .* and this run has model.family=gpt"),
        ({"model.hidden_size": 64, "model.attention_bias": True}, "model.hidden_size=32, .*model.attention_bias=false, .*and this run"),
    ],
)
def test_another_model(keys: dict[str, Any], message: str, trained: tuple[Path, list[float]], tmp_path: Path) -> None:
    config = parse_config(config_of(tmp_path, keys, steps=1, checkpoint={"init_from": str(trained[0])}))
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.").replace(r"\.*", ".*")) as error:
        starting_weights(config)
    assert error.value.fix.startswith("Set model.")


def test_nothing_there(trained: tuple[Path, list[float]], tmp_path: Path) -> None:
    def refuse(init_from: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            starting_weights(parse_config(config_of(tmp_path, {}, steps=1, checkpoint={"init_from": str(init_from)})))

    refuse(tmp_path / "nowhere", "nowhere does not exist")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "holds no checkpoint")
    shutil.copytree(trained[0], tmp_path / "copy")
    manifest = next((tmp_path / "copy").glob("checkpoints/step-*/manifest.json"))
    manifest.write_bytes(manifest.read_bytes().replace(b"llama", b"lamma"))
    refuse(tmp_path / "copy", "the newest checkpoint cannot be used: .*is damaged")
    manifest.unlink()
    refuse(tmp_path / "copy", "saving was cut off")


def test_the_whole_program(text: Path, tmp_path: Path) -> None:
    """As a user does it: a run, a second from its weights with warm-up, an interruption, and a
    damaged file.
    """
    first = write_config(tmp_path / "first", text, steps=2, every=2)
    with running(lambda: Run(first)) as run:
        assert run.wait() == 0, run.text()
    start = tmp_path / "first" / "run"
    second = write_config(tmp_path / "second", text, steps=2, every=1, init_from=str(start))
    with running(lambda: Run(second, "optimizer.warmup_steps=1", "parallel.tp=2", "zero.stage=3", ranks=2)) as run:
        assert run.wait() == 0, run.text()
        assert re.search(
            r"starting at step 1 with the weights of \S+step-00000002 \(weights after step 2\), with a fresh optimizer", run.text()
        )
    with running(lambda: Run(second, "optimizer.warmup_steps=1", "parallel.tp=2", "zero.stage=3", "train.steps=3", ranks=2)) as run:
        assert run.wait() == 0, run.text()
        assert f"checkpoint.init_from={start} is not read: this run goes on from its own checkpoint" in run.text()
    assert [s for s, _, _ in metrics(tmp_path / "second" / "run")] == [1, 2, 3]

    data = next(start.glob("checkpoints/step-00000002/*.group-000.safetensors"))
    broken = bytearray(data.read_bytes())
    broken[-9] ^= 4
    data.write_bytes(broken)
    third = write_config(tmp_path / "third", text, steps=1, init_from=str(start))
    with running(lambda: Run(third, ranks=2)) as run:
        assert run.wait() == 2
        assert "checkpoint.init_from=" in run.text() and f"{data.name} is damaged" in run.text() and "Traceback" not in run.text()
    assert load_config(third).checkpoint.init_from == start
