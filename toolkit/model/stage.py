"""This rank's part of a model that generates: its layers, and the messages to the ranks beside it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from toolkit.arch.spec import LAYER, WeightSpec
from toolkit.config.schema import RunConfig
from toolkit.model.build import DTYPES, build_chunks
from toolkit.model.cache import KeyValueCache
from toolkit.model.cache_offload import OffloadedCache
from toolkit.model.forward import Decoder
from toolkit.model.messages import Kind, Messages
from toolkit.model.savings import NO_SAVINGS, Savings, apply_savings, weight_bytes
from toolkit.model.sharded import ShardedLayers
from toolkit.model.streaming import LayerStream
from toolkit.parallel.layout import Coordinates, Layout


class Sharding(Protocol):
    """Shares out weights among the copies of a model."""

    def partition(self, parameter: torch.nn.Parameter) -> None: ...

    def engage(self, layers: ShardedLayers) -> None: ...


class Stage:
    """The layers of this rank, for forward passes alone; process groups must be up.

    read: gives this rank's part of a weight. savings: what to keep smaller than it is. sharding:
    what shares out the layers among the copies of the model.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        *,
        rank: int,
        device: torch.device,
        read: Callable[[WeightSpec], Tensor],
        savings: Savings = NO_SAVINGS,
        sharding: Sharding | None = None,
    ) -> None:
        self.config, self.layout, self.device, self.savings = config, layout, device, savings
        self.at = layout.coordinates(rank)
        self.first, self.last = self.at.pp == 0, self.at.pp == layout.pp - 1
        self.dtype = DTYPES[config.train.precision]
        apart = savings.offload != "none"
        (chunk,) = build_chunks(config, layout, device=device, read=read, leave=(lambda w: w.number is not None) if apart else None)
        self.model: Any = chunk.eval().requires_grad_(False)
        assert config.model.vocab_size is not None, "a model with weights has a vocabulary"
        self.messages = Messages(device)
        self.decoder = Decoder(self.model, vocab=config.model.vocab_size, messages=self.messages)
        self.resident = weight_bytes(self.model)
        """Bytes of the weights that stay in memory."""
        layers = self.model.decoder.layers
        if sharding is not None:
            self.decoder.sharded = self._shared_out(layers, read=read, sharding=sharding)
        elif savings.offload in ("cpu", "disk"):
            self.decoder.stream = LayerStream(
                layers,
                [self._weights_of(layer) for layer in layers],
                read=read,
                place=savings.offload,
                device=device,
                dtype=self.dtype,
            )
        apply_savings(self.model, savings)
        self.before, self.behind = (layout.rank(replace(self.at, pp=self.at.pp + step)) for step in (-1, 1))
        self.head = layout.rank(Coordinates(tp=0, cp=0, dp=self.at.dp, pp=layout.pp - 1))
        """The rank that chooses tokens for this copy of the model."""
        self.alone = layout.tp * layout.pp == 1
        self.sending: deque[tuple[Any, Tensor]] = deque()
        """Activations on their way to the next stage; they must not be freed before they have left."""
        self.spans: dict[str, list[float]] | None = None
        """Seconds of each pass over one new token a text, of layers and of ends (embedding,
        output); None where nobody measures.
        """

    def _weights_of(self, layer: Any) -> dict[str, WeightSpec]:
        """What each parameter of a layer is."""
        prefix, spec = LAYER.replace("{i}", str(layer.layer_number - 1)), self.config.model.spec
        return {name: spec.weight(prefix + name) for name, _ in layer.named_parameters()}

    def _shared_out(self, layers: Any, *, read: Callable[[WeightSpec], Tensor], sharding: Sharding) -> ShardedLayers:
        """Layers of which this copy of the model keeps its part; no more than one weight is whole
        while they are read.
        """
        parts, copies = 0, parallel_state.get_data_parallel_world_size()
        for layer in layers:
            for name, weight in self._weights_of(layer).items():
                owner, _, leaf = name.rpartition(".")
                value = read(weight).to(device=self.device, dtype=self.dtype)
                parameter = torch.nn.Parameter(value, requires_grad=False)
                setattr(layer.get_submodule(owner), leaf, parameter)
                parts += -(-value.numel() // copies) * value.itemsize
                sharding.partition(parameter)
        sharded = ShardedLayers(layers, self.decoder.layers, device=self.device)
        sharded.parts = parts
        sharding.engage(sharded)
        return sharded

    def keep_up(self) -> None:
        """Run along with other copies that still generate, where each holds a part of all layers."""
        if self.decoder.sharded is not None:
            self.decoder.sharded.keep_up()

    def close(self) -> None:
        """End what reads layers ahead."""
        if self.decoder.stream is not None:
            self.decoder.stream.close()

    def cache(self, *, batch: int, length: int, padding: Tensor | None = None) -> KeyValueCache:
        """An empty cache for `batch` texts of up to `length` tokens, kept as self.savings says."""
        m = self.config.model
        inverse = self.model.rotary_pos_emb.inv_freq if m.spec.rotary else None
        kind = OffloadedCache if self.savings.kv == "cpu" else KeyValueCache
        return kind(
            batch=batch,
            length=length,
            inverse=inverse,
            dtype=self.dtype,
            device=self.device,
            context=m.max_position_embeddings,
            padding=padding,
            window=m.sliding_window,
            int8=self.savings.kv == "int8",
            grow=self.savings.grow,
        )

    def forward(self, tokens: Tensor, cache: KeyValueCache, *, everywhere: bool = False, ahead: bool = False) -> Tensor | None:
        """One pass over new tokens [b, s], through all stages. ahead: do not wait until the next
        stage takes the activations, which settle() does.

        Logits in fp32 on the last stage, None elsewhere: of the last place [b, vocab], or of every
        place [b, s, vocab].
        """
        b, s = tokens.shape
        positions = cache.begin(s)
        if self.first:
            given = tokens
        else:
            given = torch.empty((b, s, self.config.model.hidden_size), dtype=self.dtype, device=self.device)
            self.messages.run("waiting", lambda: dist.recv(given, src=self.before))
        out = self.compute(given, positions, cache, everywhere=everywhere)
        if self.last:
            return out
        out = out.contiguous()
        if ahead:
            self.messages.run("pipeline", lambda: self.sending.append((dist.isend(out, dst=self.behind), out)))
        else:
            self.messages.run("pipeline", lambda: dist.send(out, dst=self.behind))
        return None

    def compute(self, given: Tensor, positions: Tensor, cache: KeyValueCache, *, everywhere: bool = False) -> Tensor:
        """What this stage does between receiving and sending: of tokens [b, s] or activations [b,
        s, h], activations or logits.
        """
        s = given.shape[1]
        hidden = self._timed("ends", lambda: self.decoder.embed(given, positions), new=s) if self.first else given
        hidden = self._timed("layers", lambda: self.decoder.hidden(hidden, cache), new=s)
        cache.advance(s)
        if not self.last:
            return hidden
        if everywhere:
            return self.decoder.logits(hidden)
        return self._timed("ends", lambda: self.decoder.logits(hidden[:, -1:])[:, 0], new=s)

    def _timed(self, part: str, action: Callable[[], Tensor], *, new: int) -> Tensor:
        if self.spans is None or new > 1:
            return action()
        self.messages.wait()
        started = time.perf_counter()
        out = action()
        self.messages.wait()
        self.spans.setdefault(part, []).append(time.perf_counter() - started)
        return out

    def settle(self) -> None:
        """Wait until all activations that were sent ahead have left."""
        while self.sending:
            self.messages.run("pipeline", self.sending.popleft()[0].wait)

    def share(self, tokens: Tensor) -> None:
        """Give the tokens that the last stage's first rank chose to every rank of this copy of the
        model, in place.
        """
        if not self.alone:
            group = parallel_state.get_model_parallel_group()
            self.messages.run(self._kind, lambda: dist.broadcast(tokens, src=self.head, group=group))

    def share_later(self, tokens: Tensor) -> Callable[[], None]:
        """The same in the background; call what it returns before the tokens are read. Every rank
        shares in the same order.
        """
        work = dist.broadcast(tokens, src=self.head, group=parallel_state.get_model_parallel_group(), async_op=True)
        assert work is not None
        return lambda: self.messages.run(self._kind, work.wait)

    @property
    def _kind(self) -> Kind:
        return "tensor" if self.layout.pp == 1 else "pipeline" if self.last else "waiting"
