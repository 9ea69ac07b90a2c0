"""Attention for rows of unequal length in one forward pass, without padding.

The new tokens of all rows stand side by side in one sequence of N tokens, so everything but attention runs on real
tokens alone and reads the weights once. Attention runs for each `Piece`: rows of one size class with equally many new
tokens. It reads their keys and values in place (short ones that are not adjacent are gathered), and no row pays for
another's length. transformers calls `attend` as an attention implementation of its own (`AttentionInterface`).

Grouped-query attention is packed: the query heads of one key head are laid side by side as further queries, so keys are
neither repeated nor broadcast. On a CPU in bf16 (8 rows of 2,048 tokens, 14 query and 2 key heads) that takes 1.9 ms a
layer, `enable_gqa` without a mask 20 ms, repeated keys with a mask 45 ms.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tokalign.internals.transformers import DynamicLayer

NAME = "tokalign_rows"  # the name by which transformers knows `attend`
GATHERED = (
    2**14
)  # numbers a layer, of keys and of values alike, that are sooner copied than read by a call of their own
SLACK = 128  # tokens that a sliding layer keeps beyond its window: what can be forgotten again, or written in place
PACKED_QUERIES = 64  # most queries of a key head that are packed; more repeat the keys, which their work outweighs


_updated = threading.local()  # .layer: the one whose keys come to `attend` next


@dataclass(frozen=True)
class Kind:
    """What a layer's tokens see: all before them, the last `window`, or those of their own chunk of `window`."""

    window: int | None = None
    chunked: bool = False

    def slots(self, size: int) -> int:
        """Slots that a layer of this kind keeps of a row of `size` slots: where it wraps, slot p % slots holds p."""
        return size if self.window is None else min(size, self.window + SLACK)

    def seen(self, held: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Whether tokens at positions `query` see those at positions `held`; the two broadcast."""
        seen = (held >= 0) & (held <= query)
        if self.window is not None:
            seen &= held >= query // self.window * self.window if self.chunked else held > query - self.window
        return seen


@dataclass
class Piece:
    """Rows of one size class with equally many new tokens.

    Attributes:
        size: the class, by the slots of its rows.
        places: of the rows in the class's buffer: a slice, which is read in place, or an index, which is gathered.
        tokens: of the pass, row by row.
        ends: tokens of each row with the new ones.
        new: new tokens of each row.
        masks: made by the first layer of a kind, used by the others.
    """

    size: int
    places: slice | torch.Tensor
    tokens: slice
    ends: list[int]
    new: int
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def mask(self, kind: Kind, length: int, like: torch.Tensor, eager: bool, copies: int) -> torch.Tensor:
        """Which of a row's first `length` slots its new tokens see, (rows, 1, copies × new, length).

        Bool, or what eager attention adds to its scores.
        """
        slots, key = kind.slots(self.size), (kind, like.device, copies)
        if key not in self.masks:
            ends = torch.tensor(self.ends, device=like.device)[:, None, None, None]
            # A slot holds the newest position that falls on it; a negative one has not been written.
            held = ends - 1 - (ends - 1 - torch.arange(length, device=like.device)) % slots
            self.masks[key] = _seen(kind, held, ends, self.new, like, eager).repeat(1, 1, copies, 1)
        return self.masks[key]


def _seen(
    kind: Kind, held: torch.Tensor, ends: torch.Tensor, new: int, like: torch.Tensor, eager: bool
) -> torch.Tensor:
    query = ends - new + torch.arange(new, device=like.device)[:, None]
    seen = kind.seen(held, query)
    if not eager:
        return seen
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, torch.finfo(like.dtype).min)


@dataclass
class Layout:
    """The pass in progress, shared by the layers of one cache.

    Attributes:
        pieces: in the order of their tokens.
        capacity: places in the buffer of each size class.
        before: tokens that stand before those of the pass: a number, or what must be added to each one's place in the
            pass to give its position.
        eager: whether the model's own attention is `eager` (soft caps, sinks) and not `sdpa`.
    """

    pieces: list[Piece] = field(default_factory=list)
    capacity: dict[int, int] = field(default_factory=dict)
    before: Any = 0
    eager: bool = False


class SlotLayer(DynamicLayer):
    """Keys and values of one layer: for each size class a pair (places, heads, slots, d)."""

    def __init__(self, layout: Layout, kind: Kind) -> None:
        super().__init__()
        self.layout, self.kind = layout, kind
        self.buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the new (1, heads, N, d) back as they are: `attend`, which comes next, stores them in this layer.

        So what a family does to them in between (DeepSeek makes keys of its latent vectors there) is done once.
        """
        _updated.layer = self
        return key_states, value_states

    def get_seq_length(self) -> Any:
        return self.layout.before

    def reset(self) -> None:
        """Hold nothing, and no memory for it."""
        self.buffers.clear()

    @property
    def width(self) -> int:
        """Numbers that a token has in a layer's keys; 0 while that is not known."""
        keys = next(iter(self.buffers.values()), (None,))[0]
        return 0 if keys is None else keys.shape[1] * keys.shape[3]

    def fit(self, size: int) -> None:
        """Move a class to a buffer of the layout's capacity; 0 frees it."""
        if size in self.buffers:
            old, places = self.buffers.pop(size), self.layout.capacity[size]
            if places:
                new = self._empty(size, *old)
                for mine, theirs in zip(new, old, strict=True):
                    mine[: len(theirs)] = theirs[:places]

    def copy(self, source: tuple[int, int], targets: list[tuple[int, int]], length: int) -> None:
        """Give rows the first `length` slots of another; a row is its class and its place there."""
        if source[0] in self.buffers:
            for theirs, which in zip(self.buffers[source[0]], (0, 1), strict=True):
                for size, place in targets:
                    if size not in self.buffers:
                        self._empty(size, *self.buffers[source[0]])
                    mine = self.buffers[size][which]
                    n = min(length, mine.shape[2], theirs.shape[2])
                    mine[place, :, :n] = theirs[source[1], :, :n]

    def _empty(self, size: int, *like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Zeros, not whatever is in memory: attention multiplies what is masked by 0, and 0 times NaN is NaN.
        places, slots = self.layout.capacity[size], self.kind.slots(size)
        keys, values = (x.new_zeros(places, x.shape[1], slots, x.shape[3]) for x in like)
        self.buffers[size] = (keys, values)
        return keys, values

    def read(
        self, piece: Piece, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, own: Callable[..., Any]
    ) -> torch.Tensor:
        """Store a piece's new keys and values (rows, heads, new, d) and give its attention (rows, query heads, new, d).

        Args:
            own: attention of (query, keys, values, mask or None), causal where a fifth argument says so.
        """
        kind, eager, end, new = self.kind, self.layout.eager, max(piece.ends), piece.new
        buffers = self.buffers.get(piece.size) or self._empty(piece.size, key, value)
        slots, start = buffers[0].shape[2], end - new
        # A window that is smaller than the text so far hides something even from rows of equal length.
        windowed = kind.window is not None and end > kind.window
        past: list[torch.Tensor] = []
        if windowed and new > SLACK:
            # So many tokens would overwrite what the first of them still see: they read the window from the buffer
            # before they are stored, and themselves from the pass.
            assert kind.window is not None
            first = max(0, start - kind.window + 1)
            index = torch.arange(first, start, device=key.device) % slots
            past = [
                torch.cat([old[piece.places, :, index], x], 2) for old, x in zip(buffers, (key, value), strict=True)
            ]
        self._write(piece, buffers, key, value)
        if past:
            held = torch.arange(first, end, device=key.device)
            mask = piece.masks.get((kind, key.device))
            if mask is None:
                mask = _seen(kind, held, torch.tensor(end, device=key.device), new, query, eager)[None, None]
                piece.masks[kind, key.device] = mask
            return own(query, past[0], past[1], mask, False)
        if start == 0 and min(piece.ends) == end and not windowed and new > 1:
            return own(query, key, value, None, True)
        length = min(end, slots)
        places = piece.places if isinstance(piece.places, slice) else piece.places.to(key.device)
        keys, values = (old[:, :, :length][places] for old in buffers)
        if new == 1 and min(piece.ends) == end and not windowed:
            return own(query, keys, values, None, False)
        groups = query.shape[1] // key.shape[1]
        packs = new > 1 and not eager and new * groups <= PACKED_QUERIES
        return own(query, keys, values, piece.mask(kind, length, query, eager, groups if packs else 1), False)

    def _write(self, piece: Piece, buffers: tuple[torch.Tensor, ...], key: torch.Tensor, value: torch.Tensor) -> None:
        slots, end = buffers[0].shape[2], piece.ends[0]
        new, places = min(piece.new, slots), piece.places
        if not isinstance(places, slice):
            places = places.to(key.device)  # layers may be on other devices than the embedding
        if min(piece.ends) == max(piece.ends) and (end - new) % slots + new <= slots:
            # Equally long rows are one block of the buffer.
            first = (end - new) % slots
            for mine, theirs in zip(buffers, (key, value), strict=True):
                mine[places, :, first : first + new] = theirs[:, :, -new:]
            return
        if isinstance(places, slice):
            places = torch.arange(places.start, places.stop, device=key.device)
        ends = torch.tensor(piece.ends, device=key.device)[:, None]
        index = (ends - new + torch.arange(new, device=key.device)) % slots
        for mine, theirs in zip(buffers, (key, value), strict=True):
            mine[places[:, None], :, index] = theirs[:, :, -new:].transpose(1, 2)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the pass in progress, as transformers calls it: (1, heads, N, d) each, result (1, N, heads, d).

    What a family adds to its scores by further arguments is left to its own `eager` attention; `check_model` notices
    where `sdpa` would need it.
    """
    layer: SlotLayer = _updated.layer

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> Any:
        rows, heads, new, _ = q.shape
        groups = heads // k.shape[1]
        if causal:
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=groups > 1)
        if new == 1 or new * groups <= PACKED_QUERIES:
            packed = q.reshape(rows, k.shape[1], groups * new, -1)
            return scaled_dot_product_attention(packed, k, v, mask, scale=scaling).reshape(rows, heads, new, -1)
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, mask, scale=scaling)

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> Any:
        if causal:
            position = torch.arange(q.shape[2], device=q.device)
            mask = _seen(Kind(), position, position[-1] + 1, q.shape[2], q, True)[None, None]
        theirs = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        return theirs(module, q, k, v, mask, scaling=scaling, **{**kwargs, "dropout": 0.0})[0].transpose(1, 2)

    pieces = layer.layout.pieces
    results = []
    for piece in pieces:
        # (1, heads, rows × new, d) as (rows, heads, new, d): the tokens of a row are adjacent
        own = [x if len(pieces) == 1 else x[:, :, piece.tokens] for x in (query, key, value)]
        if piece.new == 1:
            own = [x.transpose(0, 2) for x in own]
        elif len(piece.ends) > 1:
            own = [x[0].unflatten(1, (len(piece.ends), piece.new)).transpose(0, 1) for x in own]
        result = layer.read(piece, own[0], own[1], own[2], eager if layer.layout.eager else sdpa)
        results.append(result.transpose(1, 2).flatten(0, 1))
    return (results[0] if len(results) == 1 else torch.cat(results))[None], None


AttentionInterface.register(NAME, attend)  # type: ignore[arg-type]
