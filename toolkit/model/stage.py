"""This rank's part of a model that generates: its layers, and the messages to the ranks beside it."""

from __future__ import annotations

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

    read: gives this rank's part of a weight. savings: what to keep smaller than it is. sharding: what shares out the layers among the
    copies of the model.
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

    def _weights_of(self, layer: Any) -> dict[str, WeightSpec]:
        """What each parameter of a layer is."""
        prefix, spec = LAYER.replace("{i}", str(layer.layer_number - 1)), self.config.model.spec
        return {name: spec.weight(prefix + name) for name, _ in layer.named_parameters()}

    def _shared_out(self, layers: Any, *, read: Callable[[WeightSpec], Tensor], sharding: Sharding) -> ShardedLayers:
        """Layers of which this copy of the model keeps its part; no more than one weight is whole while they are read."""
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

    def forward(self, tokens: Tensor, cache: KeyValueCache, *, everywhere: bool = False) -> Tensor | None:
        """One pass over new tokens [b, s], through all stages.

        Logits in fp32 on the last stage, None elsewhere: of the last place [b, vocab], or of every place [b, s, vocab].
        """
        b, s = tokens.shape
        positions = cache.begin(s)
        if self.first:
            hidden = self.decoder.embed(tokens, positions)
        else:
            hidden = torch.empty((b, s, self.config.model.hidden_size), dtype=self.dtype, device=self.device)
            self.messages.run("waiting", lambda: dist.recv(hidden, src=self.before))
        hidden = self.decoder.hidden(hidden, cache)
        cache.advance(s)
        if not self.last:
            self.messages.run("pipeline", lambda: dist.send(hidden.contiguous(), dst=self.behind))
            return None
        return self.decoder.logits(hidden) if everywhere else self.decoder.logits(hidden[:, -1:])[:, 0]

    def share(self, tokens: Tensor) -> None:
        """Give the tokens that the last stage's first rank chose to every rank of this copy of the model, in place."""
        if not self.alone:
            kind: Kind = "tensor" if self.layout.pp == 1 else "pipeline" if self.last else "waiting"
            group = parallel_state.get_model_parallel_group()
            self.messages.run(kind, lambda: dist.broadcast(tokens, src=self.head, group=group))
