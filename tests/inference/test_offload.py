"""A model whose layers come from disk, or keys and values from the CPU, says the same; and one
larger than its memory runs.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pool

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.inference.asking import DEADLINE_S, IDS, answers, made  # noqa: E402

GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("offload"), layers=6)


@pytest.mark.parametrize(("world", "overrides"), [(1, []), (4, ["parallel.tp=2", "parallel.pp=2"])], ids=["one", "tp2 pp2"])
def test_layers_from_disk_say_the_same(world: int, overrides: list[str], pool: Pool, folder: Path) -> None:
    assert answers(pool, folder, world=world, overrides=overrides, offload="disk") == answers(pool, folder)


SHARED = [  # world, how the model is cut, where parts wait; each copy has other numbers of batches and of tokens
    pytest.param(2, [], "zero", id="dp2"),
    pytest.param(4, ["parallel.tp=2"], "zero-cpu", id="tp2 dp2 cpu"),
    pytest.param(4, ["parallel.pp=2"], "zero", id="pp2 dp2", marks=pytest.mark.all_cells),
]


@pytest.mark.parametrize(("world", "overrides", "place"), SHARED)
def test_copies_that_share_out_the_layers_say_the_same(world: int, overrides: list[str], place: str, pool: Pool, folder: Path) -> None:
    """DeepSpeed's ZeRO-Inference. A copy that has answered all its prompts brings its parts for the
    other's, to the last token.
    """
    check_sharing(pool, folder, world, overrides, offload=place)


@pytest.mark.all_cells
@pytest.mark.parametrize(("world", "overrides"), [(1, []), (4, ["parallel.tp=2"])], ids=["one", "tp2 dp2"])
def test_parts_on_nvme_say_the_same(
    world: int, overrides: list[str], pool: Pool, folder: Path, tmp_path: Path, extension: Callable[[str], None]
) -> None:
    extension("async_io")
    check_sharing(pool, folder, world, overrides, offload="zero-nvme", nvme_path=str(tmp_path))


def check_sharing(pool: Pool, folder: Path, world: int, overrides: list[str], **more: Any) -> None:
    asked = {"model": str(folder), "ids": IDS, "max_new_tokens": 8, "batch": 1}
    plain = answers(pool, folder, batch=1)
    ranks = pool.run("tests.inference.run:tokens_and_memory", world, asked | {"overrides": overrides} | more, deadline_s=240)
    assert plain and ranks[0][0] == plain
    copies = min(world, 2)
    tp = 2 if "parallel.tp=2" in overrides else 1
    matrices = 4 * 6 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 128) // (world // copies)  # bytes of a rank's layers, had it no copy
    for _, found in ranks:
        part = matrices / copies
        assert found["weights"] == pytest.approx(4 * 384 * 32 / tp + part, rel=0.1)  # the table, padded to 384 rows, is whole
        whole = found["held"] - found["weights"] + (part if more["offload"] == "zero-nvme" else 0)
        in_one = matrices / (3 if "parallel.pp=2" in overrides else 6)
        assert in_one <= whole <= 2.2 * in_one, "one layer or two are whole"


def test_a_checkpoint_of_our_own_is_read_layer_by_layer(pool: Pool, folder: Path, tmp_path: Path) -> None:
    from toolkit.convert.importing import import_model

    import_model(folder, tmp_path / "ours")
    ours = answers(pool, tmp_path / "ours", world=2, offload="disk", overrides=["parallel.tp=2"])
    assert ours == answers(pool, folder)


def test_keys_and_values_on_the_cpu_say_the_same(pool: Pool, folder: Path) -> None:
    """The cache itself: without a GPU the command refuses it, since nothing is saved."""
    plain, offloaded = (
        pool.run("tests.inference.run:logits", 1, {"model": str(folder), "cache": kind}, deadline_s=120)[0] for kind in ("plain", "cpu")
    )
    assert (plain["logits"] == offloaded["logits"]).all() and offloaded["sent"] > 0


def test_a_model_several_times_larger_than_its_memory(tmp_path: Path) -> None:
    """The kernel refuses what the plain model asks for, and the streamed one gives the plain one's
    tokens within the limit.
    """
    folder, limit = made(tmp_path, layers=56, width=256), 0.06
    done = subprocess.run(
        [sys.executable, "-m", "tests.inference.limited", str(folder), str(limit)], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["memory"]["model"] > 3 * limit * GIB and found["memory"]["held"] < limit * GIB
    assert found["memory"]["read"] >= 2 * found["memory"]["weights"] * 0.99  # the layers come anew for every token
    assert "ran out of memory" in found["plain_refused"] and "--offload disk" in found["plain_refused"]
    assert found["streamed"] == found["plain"] and len(found["plain"]) == 2


@pytest.mark.all_cells
def test_a_model_larger_than_a_limit_of_the_whole_process(tmp_path: Path) -> None:
    """`ulimit -d` of 450 MiB, Python and its libraries included, for 1.7 GB of weights."""
    folder = made(tmp_path, layers=96, width=768, dtype=torch.bfloat16)
    command = [sys.executable, "-m", "toolkit", "generate", str(folder), "--tokenizer", "bytes", "--prompt", "ab"]
    command += ["--max-new-tokens", "2", "--json"]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    limits: Any = lambda: resource.setrlimit(resource.RLIMIT_DATA, (450 * 2**20, 450 * 2**20))
    streamed = subprocess.run([*command, "--offload", "disk"], capture_output=True, text=True, timeout=600, preexec_fn=limits)
    assert streamed.returncode == 0, streamed.stderr
    found = json.loads(streamed.stdout)
    assert found["rank_0"]["memory"]["model"] > 3.4 * 450 * 2**20
    assert found["answers"][0]["tokens"] == json.loads(plain.stdout)["answers"][0]["tokens"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=600, preexec_fn=limits)
    assert refused.returncode == 4 and "ran out of memory for its weights" in refused.stderr
