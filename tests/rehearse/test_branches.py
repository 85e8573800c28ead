"""Code that runs on a GPU alone runs here at least once: every branch of our own, and those of
DeepSpeed and megatron-core that count.

Branches are found in the source by their condition, so a new one must be rehearsed too, or be named
below with its reason.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tests.parity.cells import Cell
from tests.rehearse.inside import played, run_inside

ROOT = Path(__file__).parents[2]
ROOMS = ("checkpoint", "data", "engine", "model", "profile", "train")
CONDITIONS = ("cuda", "on_gpu", "self._pin")
BF16 = {"train.precision": "bf16"}
CELLS = {
    "pipeline": Cell(2, {"parallel.pp": 2, "zero.stage": 1, "train.micro_batch_size": 2} | BF16),
    "grouped queries in fp32": Cell(2, {"zero.stage": 3}),
    "tied and offloaded": Cell(
        2, {"parallel.pp": 2, "zero.stage": 2, "zero.offload_optimizer": "cpu", "model.tie_embeddings": True, "train.micro_batch_size": 2}
    ),
    "parameters on the CPU": Cell(2, {"zero.stage": 3, "zero.offload_optimizer": "cpu", "zero.offload_param": "cpu"} | BF16),
    "shared sequence in fp32": Cell(2, {"parallel.cp": 2, "parallel.cp_exchange": "allgather", "zero.stage": 1}),
    "documents": Cell(
        2, {"data.document_mask": True, "zero.stage": 1, "train.recompute": "full", "train.offload_activations": True} | BF16
    ),
    "overlap": Cell(2, {"zero.stage": 2, "zero.deepspeed": {"zero_optimization": {"overlap_comm": True}}} | BF16),
}
NOT_REHEARSED = {
    ("train/world.py", '"nccl" if'): "the process group is open already: nobody answers in it",
    ("profile/session.py", "ProfilerActivity.CUDA"): "PyTorch's profiler takes minutes over tensors without data",
    ("train/loop.py", "MOST_QUIET"): "a rehearsal ends before a run's last words",
    ("train/sound.py", "current_device"): "a check that is off by default, and compares values",
    ("model/cache_offload.py", "torch.cuda.Stream"): "generating is not rehearsed",
    ("model/streaming.py", "torch.cuda.Stream"): "generating is not rehearsed",
    ("model/messages.py", "self.device.type"): "generating is not rehearsed",
}
# file and function: what the libraries do on a GPU and not on a CPU, or do with a GPU in mind
OF_LIBRARIES = {
    ("pipeline_parallel/schedules.py", "deallocate_output_tensor"),
    ("pipeline_parallel/schedules.py", "custom_backward"),
    ("accelerator/abstract_accelerator.py", "_torch_pin_memory"),
    ("accelerator/cuda_accelerator.py", "stream"),
    ("accelerator/cuda_accelerator.py", "Stream"),
    ("accelerator/cuda_accelerator.py", "Event"),
    ("accelerator/cuda_accelerator.py", "current_stream"),
    ("accelerator/cuda_accelerator.py", "synchronize"),
    ("zero/stage_1_and_2.py", "_record_offload_copy"),
    ("zero/stage_1_and_2.py", "_wait_for_offload_copies"),
    ("zero/stage_1_and_2.py", "async_inplace_copy_grad_to_fp32_buffer_from_gpu"),
    ("zero/partition_parameters.py", "_allgather_params_coalesced"),
    ("zero/partitioned_param_coordinator.py", "__all_gather_params"),
    ("zero/stage3.py", "partition_grads"),
}


def branches() -> dict[tuple[str, int], str]:
    """(file, first line of the branch) -> the branch, of our own rooms; what is for a CPU alone is
    left out.
    """
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / "toolkit" / room).glob("*.py")):
            text = path.read_text()
            name = f"{room}/{path.name}"
            if name == "model/cpu.py":
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, (ast.If, ast.IfExp)) and any(word in ast.unparse(node.test) for word in CONDITIONS):
                    body = node.body[0] if isinstance(node, ast.If) else node.body
                    segment = ast.get_source_segment(text, node) or ""
                    if not ast.unparse(node.test).startswith("not ") and not any(n == name and w in segment for n, w in NOT_REHEARSED):
                        found[name, body.lineno] = segment.splitlines()[0]
    return found


def test_every_branch_for_a_gpu_is_rehearsed() -> None:
    wanted = branches()
    assert len(wanted) >= 20, "the search finds none of them"
    seen = run_inside("tests.rehearse.test_branches:trace", {name: cell.raw() for name, cell in CELLS.items()}, timeout_s=400.0)
    lines = {tuple(line) for line in seen["lines"]}
    assert not {key: text for key, text in wanted.items() if key not in lines}
    missing = OF_LIBRARIES - {tuple(call) for call in seen["calls"]}
    assert not missing, missing
    assert seen["deallocated"] > 0, "a pipeline's outputs are given back once they are sent"
    assert seen["snapshot"], "the profiler makes the folder of its snapshot on every host"


def trace(cells: dict[str, Any]) -> dict[str, Any]:
    """Lines of our own files and calls within the libraries, of a step, an evaluation, a save and a
    profile on the last rank.
    """
    from megatron.core.pipeline_parallel import schedules

    import toolkit.rehearse.rank  # noqa: F401  DeepSpeed looks for its device once, and tests.pool tells it of the CPU
    from tests.pool import _forget_world
    from toolkit.engine.state import generators, set_generators

    lines: set[tuple[str, int]] = set()
    calls: set[tuple[str, str]] = set()
    deallocated, snapshot = 0, False
    free: Any = schedules.deallocate_output_tensor

    def counted(out: Any, deallocate_pipeline_outputs: bool = False) -> Any:
        nonlocal deallocated
        result = free(out, deallocate_pipeline_outputs)
        deallocated += out is not None and out.numel() == 1
        return result

    schedules.deallocate_output_tensor = counted
    with traced(lines, calls):
        for name, raw in cells.items():
            with played(raw, world=2, rank=1, steps=9) as play:
                play.step()
                play.evaluate()
                play.save()
                set_generators(generators())
                if name == "pipeline":
                    snapshot = profiled(play)
            del play
            _forget_world()
    return {"lines": sorted(lines), "calls": sorted(calls), "deallocated": deallocated, "snapshot": snapshot}


def profiled(play: Any) -> bool:
    """What `toolkit profile` measures, and what it says when memory ends; whether its snapshot is written."""
    import torch

    from toolkit.profile.oom import Place
    from toolkit.profile.session import Options, Session, header
    from toolkit.train.memory import limit_memory

    run, folder = play.run, play.config.run.dir.parent / "another host"
    limit_memory(1.0, run.world.device)
    place = Place(play.config, play.layout, play.rank, limit_gib=None)
    error = place.error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert "ran out of memory" in str(error) and "asking for 2.00 GiB" in str(error)
    session = Session(run, run.world, play.layout, folder, place)
    session._timed(1)
    found = session._memory()
    assert header(play.config, play.layout, run.world, Options(steps=1))["device"].startswith("NVIDIA")
    return bool((folder / found["snapshot"]).is_file())


@contextmanager
def traced(lines: set[tuple[str, int]], calls: set[tuple[str, str]]) -> Iterator[None]:
    """Write down which lines of ours run, and which functions of the libraries are called."""
    # tracing is slow, so only files that have such branches
    own, libraries = {str(ROOT / "toolkit" / name) for name, _ in branches()}, ("/deepspeed/", "/megatron/")

    known: dict[CodeType, Any] = {}

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            lines.add(("/".join(Path(frame.f_code.co_filename).parts[-2:]), frame.f_lineno))
        return line

    def call(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code not in known:
            name = code.co_filename
            known[code] = line if name in own else None
            if any(library in name for library in libraries):
                calls.add(("/".join(Path(name).parts[-2:]), code.co_name))
        return known[code]

    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(None)
