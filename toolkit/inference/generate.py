"""The loop that generates: prompts in, tokens out, over tensor, pipeline and data-parallel ranks.

generator = Generator(stage, stop=text.stop)
answers = generator(prompts, max_new_tokens=64, sampling=Sampling())
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from toolkit.errors import ConfigError
from toolkit.inference.request import Sampling
from toolkit.inference.sampling import choose
from toolkit.model.cache import KeyValueCache
from toolkit.model.stage import Stage

Item = TypeVar("Item")
Made = TypeVar("Made")
Row = TypeVar("Row")
OnToken = Callable[[int, int], None]
"""Called with a prompt's number and a new token of its answer."""


@dataclass
class Answer:
    """What a prompt got. number: the prompt's; finish: stop (a stop token, which is not in tokens),
    length (as many as asked for) or context (the model knows no place beyond); prompt_tokens: of
    its prompt.
    """

    number: int
    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    finish: str = ""


@dataclass(frozen=True)
class Times:
    """Seconds of prompts and of single tokens, and how many of them there were, over all rows of
    this rank.
    """

    prefill: float = 0.0
    decode: float = 0.0
    prompt_tokens: int = 0
    decoded: int = 0


NO_TIMES = Times()


@dataclass
class _Flight:
    """A micro-batch on its way through the stages, again and again. place: of the token that is
    computed, in its answer; live: rows whose answer has not ended; arrive: waits for `chosen`.
    """

    answers: list[Answer]
    limits: list[int]
    tokens: Tensor
    cache: KeyValueCache
    chosen: Tensor
    live: set[int]
    place: int = 0
    arrive: Callable[[], None] = lambda: None

    @property
    def numbers(self) -> list[int]:
        return [answer.number for answer in self.answers]


class Generator:
    """Generates with one copy of a model; every rank of the copy calls it with the same arguments
    and gets the same answers.

    stop: ids that end an answer. batch: prompts computed at once; with several pipeline stages they
    are split into as many micro-batches, so that every stage has one to compute. encode: ids of a
    prompt that is text, its number given too; it is called in a thread, for the
    next batch while one is computed. times: of what was generated before.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        stop: Iterable[int] = (),
        batch: int = 8,
        encode: Callable[[int, str], list[int]] | None = None,
        times: Times = NO_TIMES,
    ) -> None:
        self.stage, self.stop, self.batch, self.encode = stage, frozenset(stop), batch, encode
        self.times = times
        self.waited = 0.0
        """Seconds without a batch to compute."""

    def __call__(
        self,
        prompts: Sequence[tuple[int, list[int] | str]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        on_token: OnToken = lambda _number, _token: None,
    ) -> list[Answer]:
        """Answers in the order of the prompts, which are (number, ids or text)."""
        found: dict[int, Answer] = {}
        # of nearly the same length together: less padding
        order = sorted(prompts, key=lambda p: len(p[1]))
        batches = [order[start : start + self.batch] for start in range(0, len(order), self.batch)]
        with torch.no_grad():
            for rows, waited in ahead(batches, self._encoded):
                self.waited += waited
                for answer in self._batch(rows, max_new_tokens=max_new_tokens, sampling=sampling, on_token=on_token):
                    found[answer.number] = answer
        return [found[number] for number, _ in prompts]

    def _encoded(self, rows: Sequence[tuple[int, list[int] | str]]) -> list[tuple[int, list[int]]]:
        done: list[tuple[int, list[int]]] = []
        for number, prompt in rows:
            if isinstance(prompt, str):
                assert self.encode is not None, "a prompt that is text needs what encodes it"
                prompt = self.encode(number, prompt)
            done.append((number, prompt))
        return done

    def _batch(self, rows: Sequence[tuple[int, list[int]]], *, max_new_tokens: int, sampling: Sampling, on_token: OnToken) -> list[Answer]:
        stage = self.stage
        flights = [self._flight(part, max_new_tokens) for part in split_evenly(rows, self.in_flight)]
        overlapped = len(flights) > 1
        started, prefill, decoded = time.perf_counter(), 0.0, 0
        # Every rank takes the micro-batches in the same order and waits for no send, so no two
        # ranks can wait for each other.
        while any(flight.live for flight in flights):
            for flight in flights:
                if flight.live and flight.place:
                    flight.arrive()
                    if flight.place == 1:
                        prefill = time.perf_counter() - started
                    else:
                        decoded += len(flight.live)
                    self._take_all(flight, on_token, max_new_tokens)
                if not flight.live:
                    continue
                logits = stage.forward(flight.tokens, flight.cache, ahead=overlapped)
                if logits is not None and stage.at.tp == 0:
                    flight.chosen = choose(logits, sampling, prompts=flight.numbers, places=[flight.place] * len(flight.numbers))
                if overlapped:
                    flight.arrive = stage.share_later(flight.chosen)
                else:
                    stage.share(flight.chosen)
                flight.place += 1
        stage.settle()
        self.times = Times(
            self.times.prefill + prefill,
            self.times.decode + time.perf_counter() - started - prefill,
            self.times.prompt_tokens + sum(len(ids) for _, ids in rows),
            self.times.decoded + decoded,
        )
        return [answer for flight in flights for answer in flight.answers]

    @property
    def in_flight(self) -> int:
        """Micro-batches that the stages compute at the same time. Layers that are streamed would
        come anew for each one.
        """
        return self.stage.layout.pp if self.stage.savings.offload == "none" else 1

    def _flight(self, rows: Sequence[tuple[int, list[int]]], max_new_tokens: int) -> _Flight:
        stage, context = self.stage, self.stage.config.model.max_position_embeddings
        limits = [min(max_new_tokens, context - len(ids)) for _, ids in rows]
        tokens, padding = pad([ids for _, ids in rows], device=stage.device)
        return _Flight(
            answers=[Answer(number, len(ids)) for number, ids in rows],
            limits=limits,
            tokens=tokens,
            cache=stage.cache(batch=len(rows), length=tokens.shape[1] + max(limits), padding=padding),
            chosen=torch.empty(len(rows), dtype=torch.int64, device=stage.device),
            live=set(range(len(rows))),
        )

    def _take_all(self, flight: _Flight, on_token: OnToken, max_new_tokens: int) -> None:
        """Add each row's new token to its answer, and make it what the row goes on from."""
        for row, token in enumerate(flight.chosen.tolist()):
            limit = flight.limits[row]
            if row in flight.live and self._take(flight.answers[row], token, limit, on_token, context_ends=limit < max_new_tokens):
                flight.live.remove(row)
        flight.tokens = flight.chosen[:, None]

    def _take(self, answer: Answer, token: int, limit: int, on_token: OnToken, *, context_ends: bool) -> bool:
        """Add a token to an answer; whether that ends it."""
        if token in self.stop:
            answer.finish = "stop"
            return True
        answer.tokens.append(token)
        on_token(answer.number, token)
        if len(answer.tokens) < limit:
            return False
        answer.finish = "context" if context_ends else "length"
        return True


def ahead(items: Sequence[Item], make: Callable[[Item], Made]) -> Iterator[tuple[Made, float]]:
    """What is made of each item, and the seconds it was waited for: a thread makes the next while
    the caller uses this one.

    What `make` raises is raised when it is the item's turn.
    """
    if len(items) == 1:  # nothing follows, and a thread would take memory of a rank that may have none left
        started = time.perf_counter()
        yield make(items[0]), time.perf_counter() - started
        return
    with ThreadPoolExecutor(1, thread_name_prefix="prompts") as thread:
        coming = [thread.submit(make, item) for item in items[:1]]
        for following in range(1, len(items) + 1):
            started = time.perf_counter()
            made = coming.pop().result()
            waited = time.perf_counter() - started
            coming += [thread.submit(make, item) for item in items[following : following + 1]]
            yield made, waited


def split_evenly(rows: Sequence[Row], parts: int) -> list[Sequence[Row]]:
    """Rows in order, in so many parts or as many as there are rows, of nearly the same size."""
    parts = min(parts, len(rows))
    ends = [len(rows) * part // parts for part in range(parts + 1)]
    return [rows[start:end] for start, end in pairwise(ends)]


def check_lengths(prompts: Sequence[Sequence[int]], *, context: int, names: Sequence[str]) -> None:
    """Refuse a prompt that leaves no place for an answer within the model's context."""
    for ids, name in zip(prompts, names, strict=True):
        if len(ids) >= context:
            raise ConfigError(
                f"{name} has {len(ids):,} tokens, and the model's context is {context:,}",
                why="there is no place for an answer",
                fix=f"Shorten it to at most {context - 1:,} tokens.",
            )


def pad(rows: Sequence[Sequence[int]], *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids side by side, filled up with 0 on the left: ids [b, s], and how many were filled
    up, [b].
    """
    longest = max(map(len, rows))
    padding = torch.tensor([longest - len(ids) for ids in rows], device=device)
    return torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in rows], device=device), padding
