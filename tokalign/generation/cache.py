"""A KV cache layer for continuous batching: rows leave, join and are padded, and a new token costs no copy.

`DynamicLayer` concatenates, so every decoded token copies all keys and values of every layer. This one writes into a
buffer with some room to spare and hands attention a view of the filled part.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 64  # slots reserved at a time: a copy every 64 tokens, at most 64 unused slots a row


class RoomyLayer(DynamicLayer):
    """Keys and values (B, heads, slots, d) as views of larger buffers; transformers sees an ordinary dynamic layer."""

    keys: torch.Tensor
    values: torch.Tensor
    buffers: tuple[torch.Tensor, torch.Tensor]

    def fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold a copy of these keys and values, with room after them."""
        b, h, slots, _ = keys.shape
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.buffers = (
            keys.new_empty(b, h, slots + ROOM, keys.shape[-1]),
            values.new_empty(b, h, slots + ROOM, values.shape[-1]),
        )
        self._show(slots)
        self.keys.copy_(keys)
        self.values.copy_(values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, heads, T, d) and return everything held."""
        if not self.is_initialized:
            self.fill(key_states, value_states)
            return self.keys, self.values
        past, new = self.keys.shape[-2], key_states.shape[-2]
        if past + new > self.buffers[0].shape[-2]:
            self.fill(torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2))
            return self.keys, self.values
        self._show(past + new)
        self.keys[:, :, past:] = key_states
        self.values[:, :, past:] = value_states
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be repeated."""
        index = beam_idx.to(self.keys.device)
        self.fill(self.keys.index_select(0, index), self.values.index_select(0, index))

    def trim(self, slots: int) -> None:
        """Forget the first slots of every row."""
        length = self.keys.shape[-2] - slots
        keys, values = self.buffers
        self.buffers = (keys[:, :, slots:], values[:, :, slots:])
        self._show(length)

    def join(self, other: RoomyLayer) -> None:
        """Append the rows of `other`; the shorter of the two gets empty slots in front."""
        mine, slots = self.keys.shape[0], max(self.keys.shape[-2], other.keys.shape[-2])
        rows, (b, h, _, d), e = mine + other.keys.shape[0], self.keys.shape, self.values.shape[-1]
        old = (self.keys, self.values)
        self.buffers = (self.keys.new_zeros(rows, h, slots + ROOM, d), self.values.new_zeros(rows, h, slots + ROOM, e))
        self._show(slots)
        for (keys, values), part in ((old, slice(0, b)), ((other.keys, other.values), slice(b, rows))):
            self.keys[part, :, slots - keys.shape[-2] :] = keys
            self.values[part, :, slots - values.shape[-2] :] = values

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
