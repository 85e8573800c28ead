from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.config.schema import RunConfig
from toolkit.data.dataset import build_datasets, resolve_data
from toolkit.data.loader import batches, sample_ids
from toolkit.errors import DataError
from toolkit.parallel.layout import Layout

ROOT = Path(__file__).parents[2]


@pytest.fixture
def train(config: Callable[..., RunConfig]) -> Any:
    run = config()
    return build_datasets(run, resolve_data(run, prepare_missing=False))[0]


def read(dataset: Any, **options: Any) -> list[list[list[int]]]:
    rows = batches(dataset, layout=options.pop("layout", Layout(micro_batch_size=2)), dp_rank=0, global_batch_size=8, **options)
    out = [torch.cat([b["tokens"], b["labels"]], dim=1).tolist() for b in rows]
    rows.close()
    return out


@given(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 4), st.integers(1, 3), st.integers(0, 40), st.integers(0, 3), st.booleans())
def test_every_layout_sees_the_same_samples_in_a_step(dp: int, micro: int, count: int, samples: int, consumed: int, tensor: bool) -> None:
    size = dp * micro * count
    layout = Layout(dp=dp, micro_batch_size=micro, num_microbatches=count, tp=2 if tensor else 1)
    start = consumed * size
    ranks = [list(sample_ids(samples=samples, layout=layout, dp_rank=r, global_batch_size=size, consumed_samples=start)) for r in range(dp)]
    steps = max(0, (samples - start) // size)
    for rank in ranks:
        assert len(rank) == steps * count
        assert all(len(ids) == micro for ids in rank)
    for step in range(steps):
        seen = [i for rank in ranks for ids in rank[step * count : (step + 1) * count] for i in ids]
        assert seen == list(range(start + step * size, start + (step + 1) * size))


def test_batches_are_shifted_samples(train: Any) -> None:
    rows = batches(train, layout=Layout(dp=2, micro_batch_size=2), dp_rank=1, global_batch_size=8)
    for step in range(3):
        for micro in range(2):
            batch = next(rows)
            assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64
            assert batch["tokens"].is_contiguous() and batch["labels"].is_contiguous()
            for row in range(2):
                text = torch.from_numpy(train[step * 8 + 4 + micro * 2 + row]["text"])
                assert torch.equal(batch["tokens"][row], text[:-1])
                assert torch.equal(batch["labels"][row], text[1:])
    rows.close()
    with pytest.raises(StopIteration):
        next(rows)


def test_workers_do_not_change_what_is_read(train: Any) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    alone = read(train, workers=0)
    assert len(alone) == len(train) // 8 * 4
    for workers in (1, 3):
        assert read(train, workers=workers, seed=workers) == alone
    assert torch.equal(torch.get_rng_state(), before), "torch's generator belongs to the model"


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_goes_on_with_the_next_sample(train: Any, workers: int) -> None:
    assert read(train, workers=workers, consumed_samples=24) == read(train, workers=0)[12:]


def test_a_batch_that_does_not_divide_is_refused(train: Any) -> None:
    with pytest.raises(DataError, match=r"train\.global_batch_size=8 is not a multiple of 6"):
        batches(train, layout=Layout(dp=3, micro_batch_size=2), dp_rank=0, global_batch_size=8)


READER = """
import sys, time
from torch.utils.data._utils import worker
from toolkit.config.schema import RunConfig
from toolkit.data.dataset import build_datasets, resolve_data
from toolkit.data.loader import batches
from toolkit.parallel.layout import Layout
config = RunConfig.model_validate_json(sys.argv[1])
worker.MP_STATUS_CHECK_INTERVAL = 600.0  # torch's own watch over the parent, which would end them too
train = build_datasets(config, resolve_data(config, prepare_missing=False))[0]
rows = batches(train, layout=Layout(micro_batch_size=2), dp_rank=0, global_batch_size=8, workers=2)
next(rows)
print("ready", flush=True)
for line in sys.stdin:
    for _ in range(4):
        next(rows)
    print("read", flush=True)
print("left", flush=True)
"""


def _reader(config: RunConfig) -> tuple[subprocess.Popen[str], list[int]]:
    command = [sys.executable, "-W", "ignore", "-c", READER, config.model_dump_json()]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != "ready":
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, [int(c) for c in children]


def _gone(pids: list[int], *, within: float) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not any(_alive(p) for p in pids):
            return True
        time.sleep(0.02)
    return not any(map(_alive, pids))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_with_a_killed_rank(config: Callable[..., RunConfig]) -> None:
    process, workers = _reader(config())
    assert len(workers) >= 2
    process.kill()
    process.wait()  # not communicate(): that would wait for the workers, who hold the pipe too
    assert _gone(workers, within=60)


def test_workers_outlive_a_sigterm_and_leave_with_the_rank(config: Callable[..., RunConfig]) -> None:
    process, workers = _reader(config())
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    # Still reading, and without a close() the process ends by itself.
    out, _ = process.communicate("go\n" * 5, timeout=60)
    assert out.split() == ["read"] * 5 + ["left"]
    assert process.returncode == 0
    assert _gone(workers, within=60)


def test_workers_that_hang_within_fork_are_forked_again(
    train: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hanging = [True]

    def in_child() -> None:
        if hanging[0]:
            time.sleep(600)

    def in_parent() -> None:
        hanging[0] = False  # the first fork alone

    os.register_at_fork(after_in_child=in_child, after_in_parent=in_parent)
    monkeypatch.setattr("toolkit.data.loader._START_S", 5.0)
    assert read(train, workers=2) == read(train)
    assert "of 2 reading processes hang" in caplog.text
