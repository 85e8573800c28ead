"""Runs with the stand-in of Transformer Engine, on worker processes that import it: python -m
tests.te.run CALLS ANSWERS

CALLS: JSON, name -> [function of this file, number of ranks, its argument]; ANSWERS: JSON, name ->
[each rank's answer], or what failed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from toolkit.parallel.case import Machine

GPU = Machine(cuda=True, transformer_engine=True)


def steps(raw: dict[str, Any]) -> dict[str, Any]:
    """Losses and norms of a run's steps, and digests of its parameters under their global names."""
    from tests.parity.run import digests
    from tests.rank import Rank

    rank = Rank(raw, machine=GPU)
    losses, norms = zip(*(rank.step(number) for number in range(rank.config.train.steps)), strict=True)
    return {
        "losses": losses,
        "norms": norms,
        "digests": digests(rank.engine, rank.chunks, rank.config.model.spec, tp=rank.at.tp),
        "modules": sorted({type(module).__name__ for chunk in rank.chunks for module in chunk.modules()}),
    }


def train(raw: dict[str, Any]) -> dict[str, Any]:
    """A run with checkpoints, see tests/checkpoint/run.py."""
    from tests.checkpoint.run import train

    return train(raw, machine=GPU)


def built(raw: dict[str, Any]) -> dict[str, Any]:
    """Names, shapes and values of a rank's parameters as they are made, and how many bytes of whole
    ones there were at once.
    """
    import torch

    from toolkit.config.load import parse_config
    from toolkit.model.build import build_chunks
    from toolkit.parallel.rules import check
    from toolkit.train.world import World, connect

    config, world = parse_config(raw), World.from_environment()
    layout = check(config, world.size, machine=GPU)
    connect(world, layout, seed=config.run.seed)
    found: dict[str, Any] = {}
    whole = Whole()

    def partition(parameter: torch.nn.Parameter) -> None:
        found[str(len(found))] = [list(parameter.shape), float(parameter.mean()), float(parameter.std(correction=0))]
        parameter.data = torch.empty(0)  # as ZeRO-3 leaves it, with this rank's part elsewhere

    with whole:
        (model,) = build_chunks(config, layout, device=world.device, partition=partition)
    names = [name for name, _ in model.named_parameters()]
    return {"parameters": dict(zip(names, found.values(), strict=True)), "peak": whole.peak}


def _mode() -> type:
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


class Whole(_mode()):  # type: ignore[misc]
    """The most bytes of tensors that were alive at once in host memory, of those made in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        import torch
        from torch.utils._pytree import tree_leaves

        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                key, nbytes = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += nbytes
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, nbytes)
        return result

    def _gone(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.now -= nbytes


def main(calls: Path, answers: Path) -> None:
    from tests.pool import CellFailed, Pool

    pool, found = Pool(2), {}
    for name, (function, world, argument) in json.loads(calls.read_text()).items():
        try:
            found[name] = pool.run(f"tests.te.run:{function}", world, argument, deadline_s=240)
        except CellFailed as failed:
            found[name] = str(failed)
    pool.close()
    answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
