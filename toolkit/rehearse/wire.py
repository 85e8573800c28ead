"""Every message that a rank puts on a process group, written down at the class all of
torch.distributed's calls end in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch.distributed as dist

from toolkit.profile.clock import COLLECTIVES, plain_name
from toolkit.rehearse.place import here, tensors_of
from toolkit.rehearse.price import Price, names_of
from toolkit.rehearse.step import Message, Step


class Wire:
    """Writes a rank's messages into a step. step, stream: give the step and the stream of this
    moment; groups: number by ranks.
    """

    def __init__(self, rank: int, *, price: Price | None, step: Callable[[], Step], stream: Callable[[], int]) -> None:
        self.rank, self.price, self.step, self.stream = rank, price, step, stream
        self.groups: dict[tuple[int, ...], int] = {}
        self._batch: int | None = None
        self._batches = 0
        self._inside = False
        self._works: dict[int, int] = {}

    @contextmanager
    def written(self) -> Iterator[None]:
        """Write down what goes through torch's process groups within this context."""
        group_class, work_class, anything = dist.ProcessGroup, dist.Work, cast(Any, dist)
        before = {name: vars(group_class)[name] for name in COLLECTIVES if name in vars(group_class)}
        kept = {name: getattr(group_class, name) for name in before}
        wait_before, wait = vars(work_class)["wait"], work_class.wait
        batched = anything.batch_isend_irecv

        def counted(name: str) -> Callable[..., Any]:
            call, place = kept[name], COLLECTIVES[name]

            def method(group: Any, *args: Any, **kwargs: Any) -> Any:
                if self._inside or group.size() == 1:
                    return call(group, *args, **kwargs)
                number = self._message(group, name, place, args)
                self._inside = True
                try:
                    work = call(group, *args, **kwargs)
                finally:
                    self._inside = False
                if work is not None:
                    self._works[id(work)] = number
                return work

            return method

        def waited(work: Any, *args: Any, **kwargs: Any) -> Any:
            number, step = self._works.pop(id(work), None), self.step()
            if number is not None and number < len(step.messages):
                step.program.append(["wait", self.stream(), number])
            return wait(work, *args, **kwargs)

        def batch(operations: Any) -> Any:
            self._batch, self._batches = self._batches, self._batches + 1
            try:
                return batched(operations)
            finally:
                self._batch = None

        try:
            for name in kept:
                setattr(group_class, name, counted(name))
            work_class.wait = waited  # type: ignore
            anything.batch_isend_irecv = batch
            yield
        finally:
            for name, method in before.items():
                setattr(group_class, name, method)
            work_class.wait = wait_before  # type: ignore
            anything.batch_isend_irecv = batched

    def _message(self, group: Any, name: str, place: int, args: Any) -> int:
        ranks = tuple(dist.get_process_group_ranks(group))
        tensors = tensors_of(args[place]) if len(args) > place else []
        peer = None
        if name in ("send", "recv"):
            peer = ranks[args[1]]
        elif name == "broadcast" and len(args) > 1:
            peer = ranks[args[1].rootRank]
        nbytes = sum(t.numel() * t.element_size() for t in tensors)
        operation = plain_name(name)
        other = peer if name in ("send", "recv") else None
        seconds = self.price.message(operation, ranks, nbytes, peer=other, rank=self.rank) if self.price else 0.0
        step = self.step()
        number = len(step.messages)
        dtype = names_of(tensors[0].dtype) if tensors else ""
        # torch itself makes the current stream wait where a collective is not asked for as asynchronous
        waits = not bool(getattr(args[-1], "asyncOp", True)) if args else False
        message = Message(
            operation, self.groups.setdefault(ranks, len(self.groups)), nbytes, dtype, peer, self._batch, waits, seconds, here()
        )
        step.messages.append(message)
        step.program.append(["message", self.stream(), number])
        return number
