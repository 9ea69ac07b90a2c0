"""A KV cache layer for continuous batching: rows leave, join and are padded, and a new token costs no copy.

`DynamicLayer` concatenates, so every decoded token copies all keys and values of every layer. This one writes into a
buffer with some room to spare and hands attention a view of the filled part.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedConfig

from tokalign.internals.transformers import DynamicLayer

ROOM = 64  # slots reserved at a time: a copy every 64 tokens, at most 64 unused slots a row


class RoomyLayer(DynamicLayer):
    """Keys and values (B, heads, slots, d) as views of larger buffers; transformers sees an ordinary dynamic layer."""

    keys: torch.Tensor
    values: torch.Tensor
    buffers: tuple[torch.Tensor, torch.Tensor]

    def reserve(self, rows: int, slots: int, like: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Show `slots` slots of new, unfilled buffers that have room after them."""
        keys, values = (x.new_empty(rows, x.shape[1], slots + ROOM, x.shape[3]) for x in like)
        self.buffers = (keys, values)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show(slots)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, heads, T, d) and return everything held."""
        past, new = self.get_seq_length(), key_states.shape[-2]
        if not self.is_initialized or past + new > self.buffers[0].shape[-2]:
            old = (self.keys, self.values)
            self.reserve(key_states.shape[0], past + new, (key_states, value_states))
            if past:
                self.keys[:, :, :past], self.values[:, :, :past] = old
        else:
            self._show(past + new)
        self.keys[:, :, past:] = key_states
        self.values[:, :, past:] = value_states
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be repeated."""
        old, index = (self.keys, self.values), beam_idx.to(self.keys.device)
        self.reserve(len(index), old[0].shape[-2], old)
        torch.index_select(old[0], 0, index, out=self.keys)
        torch.index_select(old[1], 0, index, out=self.values)

    def trim(self, slots: int) -> None:
        """Forget the first slots of every row."""
        length = self.keys.shape[-2] - slots
        keys, values = self.buffers
        self.buffers = (keys[:, :, slots:], values[:, :, slots:])
        self._show(length)

    def join(self, other: RoomyLayer) -> None:
        """Append the rows of `other`; the shorter of the two gets empty slots in front."""
        parts = [(self.keys, self.values), (other.keys, other.values)]
        slots = max(keys.shape[-2] for keys, _ in parts)
        self.reserve(sum(keys.shape[0] for keys, _ in parts), slots, parts[0])
        row = 0
        for part in parts:
            rows, empty = slice(row, row + part[0].shape[0]), slots - part[0].shape[-2]
            for mine, theirs in zip((self.keys, self.values), part, strict=True):
                mine[rows, :, :empty] = 0.0  # masked, but what attention multiplies by 0 must be a number
                mine[rows, :, empty:] = theirs
            row = rows.stop

    def _show(self, slots: int) -> None:
        self.keys, self.values = (buffer[:, :, :slots] for buffer in self.buffers)


def is_plain(config: PreTrainedConfig) -> bool:
    """Whether the model's cache keeps every key in its own slot: no sliding window, recurrent or shared state."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def new_cache(config: PreTrainedConfig) -> DynamicCache:
    """Empty cache for a model: roomy layers where `is_plain`, else transformers' own."""
    cache = DynamicCache(config=config)
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [RoomyLayer() for _ in cache.layers]
    return cache
