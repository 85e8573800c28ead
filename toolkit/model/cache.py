"""Keys and values of the tokens so far, where each of them is, and who attends to what.

cache = KeyValueCache(batch=2, length=64, rope=rope_frequencies(model), dtype=dtype, device=device, context=2048)
cache.begin(count)         # once for all layers, before `count` new columns
keys, values = cache.append(layer, key, value)
cache.advance(count)
"""

from __future__ import annotations

import torch
from megatron.core.inference.contexts.static_context import StaticInferenceContext
from torch import Tensor


class KeyValueCache(StaticInferenceContext):
    """megatron-core's inference context with keys kept as attention reads them: rotated, and one
    head's tokens in a row.

    megatron-core's own cache holds keys before rotation, [s, b, groups, d], and turns all of them
    again for every token. Here key_value_memory_dict maps a layer's number to (keys, values), each
    [b, groups, length, d].

    length: tokens of prompt and answer together; inverse: RoPE's inverse wavelengths, None where
    positions are learned; context: places that the model knows; padding: how many columns each row
    is padded by on the left, [b], None for prompts of one length;
    window: of sliding attention. int8: keep one byte a number, and one scale for each token of a
    head. grow: take memory for twice as many columns whenever they are full, not for all of them at
    once.
    """

    def __init__(
        self,
        *,
        batch: int,
        length: int,
        inverse: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        context: int,
        padding: Tensor | None = None,
        window: int | None = None,
        int8: bool = False,
        grow: bool = False,
    ) -> None:
        super().__init__(batch, length)
        self.window = window if window is not None and window < length else None
        self.device, self.context = device, context
        self.padding = padding if padding is not None and bool(padding.any()) else None
        self.turns: tuple[Tensor, Tensor] | None = None
        if inverse is not None:
            angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inverse)
            angles = torch.cat((angles, angles), dim=-1)
            self.turns = angles.cos().to(dtype), angles.sin().to(dtype)  # each [length, d]
        self.here: tuple[Tensor, Tensor] | None = None
        self.mask: Tensor | None = None
        self.int8, self.grow = int8, grow
        self.scales: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def used(self) -> int:
        """Columns that hold tokens or padding."""
        return int(self.sequence_len_offset)

    def begin(self, count: int) -> Tensor:
        """Place of each of the next `count` columns in its own text, [b, count]; padding counts as place 0.

        How queries and keys turn there, and what they attend to, is worked out here once for all layers.
        """
        start, end = self.used, self.used + count
        self.mask = self._mask(start, end)
        columns = torch.arange(start, end, device=self.device)
        if self.padding is None:
            if self.turns is not None:
                cos, sin = (t[None, start:end, None, None] for t in self.turns)  # [1, s, 1, 1, d]
                self.here = cos, sin
            return columns.expand(self.max_batch_size, count)
        # a row that has ended before others may be past the context: its tokens are computed, and
        # nobody looks at them
        positions = (columns - self.padding[:, None]).clamp_(min=0, max=self.context - 1)
        if self.turns is not None:
            cos, sin = (t[positions][:, :, None, None] for t in self.turns)  # [b, s, 1, 1, d]
            self.here = cos, sin
        return positions

    def _mask(self, start: int, end: int) -> Tensor | None:
        """Which columns each new one attends to, [b or 1, 1, new, columns] (True: attends).

        None where that needs no mask: a first prompt without padding is causal, and a single token
        sees all before it.
        """
        if self.padding is None and (self.window is None or end <= self.window) and (end - start == 1 or start == 0):
            return None
        columns = torch.arange(end, device=self.device)
        rows = columns[start:, None]
        seen = columns <= rows
        if self.window is not None:
            seen &= columns > rows - self.window
        if self.padding is None:
            return seen[None, None]
        real = columns >= self.padding[:, None]  # [b, columns]
        # a column of padding attends to itself: softmax over nothing would give NaN
        return (seen & real[:, None, :] | (columns == rows))[:, None]

    def turn(self, x: Tensor) -> Tensor:
        """Queries or keys [b, s, groups, heads, d] turned by their positions."""
        if self.here is None:
            return x
        cos, sin = self.here
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values [b, s, groups, d]; all of its so far, [b, groups,
        columns, d].
        """
        start, end = self.used, self.used + key.shape[1]
        new = key.transpose(1, 2), value.transpose(1, 2)
        if layer not in self.key_value_memory_dict or self.key_value_memory_dict[layer][0].shape[2] < end:
            self._allocate(layer, new[0], end)
        kept = self.key_value_memory_dict[layer]
        if self.int8:
            scales = self.scales[layer]
            for memory, scale, x in zip(kept, scales, new, strict=True):
                scale[:, :, start:end] = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-8) / 127
                # in fp32, and held to 127: a scale rounded down would turn the largest number into -128
                memory[:, :, start:end] = (x.float() / scale[:, :, start:end]).round_().clamp_(-127, 127)
            keys, values = (m[:, :, :end] * s[:, :, :end] for m, s in zip(kept, scales, strict=True))
            return keys, values
        for memory, x in zip(kept, new, strict=True):
            memory[:, :, start:end] = x
        return kept[0][:, :, :end], kept[1][:, :, :end]

    def _allocate(self, layer: int, like: Tensor, end: int) -> None:
        """Memory for a layer's keys and values up to column `end` at least, with what is there already."""
        columns = min(max(end, 2 * self.used), self.max_sequence_length) if self.grow else self.max_sequence_length
        shape = (like.shape[0], like.shape[1], columns, like.shape[3])
        parts = [(self.key_value_memory_dict, shape, torch.int8 if self.int8 else like.dtype)]
        if self.int8:
            parts.append((self.scales, (*shape[:3], 1), like.dtype))
        for held, size, dtype in parts:
            new = like.new_empty(size, dtype=dtype), like.new_empty(size, dtype=dtype)
            for before, after in zip(held.get(layer, ()), new, strict=False):
                after[:, :, : self.used] = before[:, :, : self.used]
            held[layer] = new

    def advance(self, count: int) -> None:
        """Count columns that every layer of this stage now holds."""
        self.increment_sequence_len_offset(count)
        self.enable_decode_mode()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, those of columns not yet used included."""
        return sum(t.nbytes for held in (self.key_value_memory_dict, self.scales) for pair in held.values() for t in pair)
