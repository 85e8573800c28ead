"""Data sets, losses and hooks that the tests hand to a Trainer, good ones and bad ones."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import torch.distributed as dist

SEQ, IDS = 16, 40


class Numbers:
    """`size` samples of random ids; sample i is the same everywhere."""

    def __init__(self, size: int = 64, seed: int = 0) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"text": np.random.default_rng((self.seed, i)).integers(0, IDS, SEQ + 1)}


class Pairs(Numbers):
    """The same samples as tokens and labels, as tensors and with a mask."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        import torch

        text = torch.from_numpy(super().__getitem__(i)["text"])
        return {"tokens": text[:-1], "labels": text[1:], "mask": torch.arange(SEQ) % 2 == 0}


class Named(Numbers):
    identity = "numbers, version 1"


class TooLong(Numbers):
    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"text": np.zeros(SEQ + 2, dtype=np.int64)}


class BadIds(Numbers):
    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"text": np.full(SEQ + 1, IDS)}


class IgnoredLabels(Numbers):
    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"tokens": np.zeros(SEQ, dtype=np.int64), "labels": np.full(SEQ, -1)}


class Masked(Numbers):
    """Samples of which a third and more is left out, each another part: by a mask, and the first
    label by its value.
    """

    def __getitem__(self, i: int) -> dict[str, Any]:
        text = super().__getitem__(i)["text"]
        mask = np.arange(SEQ) < 4 + i % 7
        labels = text[1:].copy()
        labels[0] = -100
        labels[-1] = 0  # nobody looks at it
        return {"tokens": text[:-1], "labels": labels, "loss_mask": mask}


class WideMask(Numbers):
    def __getitem__(self, i: int) -> dict[str, Any]:
        return super().__getitem__(i) | {"loss_mask": np.ones((SEQ, SEQ), np.uint8)}


class HalfMask(Numbers):
    def __getitem__(self, i: int) -> dict[str, Any]:
        return super().__getitem__(i) | {"loss_mask": np.full(SEQ, 0.5)}


class Halves(Numbers):
    """Two documents a sample."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        return super().__getitem__(i) | {"positions": np.arange(SEQ) % (SEQ // 2)}


class Shifted(Numbers):
    def __getitem__(self, i: int) -> dict[str, Any]:
        return super().__getitem__(i) | {"positions": np.arange(SEQ) + 1}


class Floats(Numbers):
    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"text": np.zeros(SEQ + 1)}


class NoDict(Numbers):
    def __getitem__(self, i: int) -> Any:
        return np.zeros(SEQ + 1)


class BreaksLate(Numbers):
    """Sample 13 cannot be read: in their own order the second rank's of step 4, with 4 samples a
    step.
    """

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i == 15:
            raise OSError(5, "the disk is gone")
        return super().__getitem__(i)


class EachRankItsOwn(Numbers):
    """Another length on each rank."""

    def __len__(self) -> int:
        return self.size + dist.get_rank()


class NoLength(Numbers):
    def __len__(self) -> int:
        raise RuntimeError("I never counted them")


class Stream:
    """No length: samples come one after the other."""

    def __iter__(self) -> Any:
        return iter(())


def masked(losses: Any, batch: dict[str, Any]) -> Any:
    return (losses * batch["mask"]).sum() / batch["mask"].sum()


def every_second(losses: Any, batch: dict[str, Any]) -> Any:
    """What masked() is on Pairs, without a mask."""
    return losses[:, ::2].mean()


def by_weight(losses: Any, batch: dict[str, Any]) -> Any:
    """What no loss at all does, written by hand."""
    return (losses * batch["weights"]).sum()


def root_mean_square(losses: Any, batch: dict[str, Any]) -> Any:
    """A number that its own backward needs unchanged."""
    return losses.square().mean().sqrt()


def per_sequence(losses: Any, batch: dict[str, Any]) -> Any:
    return losses.mean(dim=1)


def a_float(losses: Any, batch: dict[str, Any]) -> Any:
    return float(losses.mean())


def detached(losses: Any, batch: dict[str, Any]) -> Any:
    return losses.mean().detach()


def wants_a_mask(losses: Any, batch: dict[str, Any]) -> Any:
    return (losses * batch["mask"]).mean()


def raises_late_on_one_rank(losses: Any, batch: dict[str, Any]) -> Any:
    raises_late_on_one_rank.calls += 1  # type: ignore[attr-defined]
    if raises_late_on_one_rank.calls > 2 and dist.get_rank() == dist.get_world_size() - 1:  # type: ignore[attr-defined]
        raise ZeroDivisionError("no tokens left")
    return losses.mean()


raises_late_on_one_rank.calls = 0  # type: ignore[attr-defined]


def raises_in_step_2(step: Any) -> None:
    if step.record.step == 2:
        raise ValueError("I do not like this loss\nat all")


def raises_on_rank_1(step: Any) -> None:
    if step.rank == 1 and step.record.step == 2:
        raise KeyError("perplexity")


def exits_on_rank_1(step: Any) -> None:
    if step.rank == 1:
        raise SystemExit(0)


def raises_in_the_last_step(step: Any) -> None:
    if step.rank == 1 and step.record.step == 4:
        raise RuntimeError("too late")


def takes_a_name(step: Any) -> None:
    step.add("loss", 1.0)


def adds(step: Any) -> None:
    step.add("double", 2 * step.record.loss)
    step.add("nothing", float("nan"))


def adds_on_eval(step: Any) -> None:
    step.add("eval_double", 2 * step.record.eval_loss)


def adds_on_save(step: Any) -> None:
    step.add("saved", float(step.checkpoint.name.removeprefix("step-")))


def stops_on_rank_1(step: Any) -> None:
    if step.rank == 1 and step.record.step == 2:
        step.stop("enough")


def sees_the_model(step: Any) -> None:
    step.add("parameters", sum(p.numel() for chunk in step.model for p in chunk.parameters()))


class StuckOnRank1(Numbers):
    """From step 3 on, rank 1 waits for ever for its samples."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        if getattr(stuck_from_step_2, "over", False) and dist.get_rank() == 1:
            threading.Event().wait()
        return super().__getitem__(i)


def stuck_from_step_2(step: Any) -> None:
    stuck_from_step_2.over = step.record.step == 2  # type: ignore[attr-defined]


def flips_a_bit_on_rank_2(step: Any) -> None:
    """As a memory cell that fails would, after step 2."""
    import torch

    if step.record.step == 2 and step.rank == 2:
        weight = next(iter(step.model[-1].parameters()))
        weight.detach().view(torch.int32).view(-1)[3] ^= 1


def computes_wrong_on_rank_1(output: Any, batch: Any) -> Any:
    """A loss that comes out another way now and then on one rank, while nothing is trained."""
    import torch

    loss = output.mean()
    if dist.get_rank() == 1 and not torch.is_grad_enabled():
        computes_wrong_on_rank_1.calls += 1  # type: ignore[attr-defined]
        return loss * (1 + 1e-4 * computes_wrong_on_rank_1.calls)  # type: ignore[attr-defined]
    return loss


computes_wrong_on_rank_1.calls = 0  # type: ignore[attr-defined]


def is_slow_on_rank_1(step: Any) -> None:
    if step.rank == 1:
        time.sleep(0.1)
