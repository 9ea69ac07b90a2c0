"""Two models kept in step: a causal LM with a KV cache in which every row has its own length.

Slot j of a row holds position j, so rows need no common length, nothing is ever padded, trimmed or rolled back, and
a row can be given another's slots. A forward pass extends any subset of the rows, each by any number of tokens: new
tokens are aligned on the right, the padding before them is written to a slot that nobody reads, and a mask (rows, 1,
new, slots) lets each token see the slots up to its own position. Where the rows are equally long no mask is needed,
which is always so for a single row and is the fast path of attention.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from tokalign.internals.transformers import Cache, DynamicLayer, DynamicSlidingWindowLayer, attention_of

ROOM = 64  # slots reserved at a time: a copy every 64 tokens
SPARE = 2  # buffers that are more than this many times as large as the rows need are given back
FORWARD_TOKENS = 16384  # most tokens of several rows in one forward pass; one longer row goes alone
PADDING = 256  # padded tokens in a pass that are always worth the pass they save
PADDED_SHARE = 1.5  # beyond that, a pass may hold this many times its real tokens


class Layout:
    """Where the rows of the forward pass in progress are, shared by the layers of one cache.

    Attributes:
        capacity: rows and slots of the buffers; slot `capacity[1]` takes the padding.
        part: the rows as a slice, where they are adjacent and in order, or None.
        index: (R,) the rows.
        past: slots before the new tokens where all rows have equally many and there is no padding, or None.
        slots: (R, T) slot of each new token; unused where `past` is known.
        length: slots that are shown to attention.
        new: T.
    """

    capacity: tuple[int, int] = (0, 0)
    part: slice | None
    index: torch.Tensor
    past: int | None
    slots: torch.Tensor
    length: int = 0
    new: int = 0


class SlotLayer(DynamicLayer):
    """Keys and values (rows, heads, slots + 1, d) of one layer; transformers sees those of the pass in progress."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new (R, heads, T, d) into their slots and return all that the rows hold, (R, heads, L, d)."""
        if not self.is_initialized:
            self.keys, self.values = self._empty(key_states), self._empty(value_states)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, buffer: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        # Rows that are adjacent and equally long are one block of the buffer, which is written and shown without a
        # copy. All other rows are written by index, and gathered for attention where they are not adjacent.
        at = self.layout
        if at.part is not None and at.past is not None:
            buffer[at.part, :, at.past : at.length] = new
            return buffer[at.part, :, : at.length]
        rows = at.index.to(buffer.device)
        buffer[rows[:, None], :, at.slots.to(buffer.device)] = new.transpose(1, 2)
        return buffer[at.part, :, : at.length] if at.part is not None else buffer[:, :, : at.length][rows]

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros, not whatever is in memory: attention multiplies what is masked by 0, and 0 times NaN is NaN.
        rows, slots = self.layout.capacity
        return like.new_zeros(rows, like.shape[1], slots + 1, like.shape[3])

    def reset(self) -> None:
        """Hold nothing, and no memory for it (transformers 5.16 keeps the buffers and fills them with zeros)."""
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False

    def fit(self) -> None:
        """Move to buffers of the layout's capacity."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._empty(old)
            rows, slots = min(len(old), len(new)), min(old.shape[2], new.shape[2]) - 1
            new[:rows, :, :slots] = old[:rows, :, :slots]
            setattr(self, name, new)

    def copy(self, source: int, targets: int | list[int], length: int) -> None:
        """Give rows the first slots of another row."""
        for buffer in (self.keys, self.values):
            buffer[targets, :, :length] = buffer[source, :, :length]

    def get_seq_length(self) -> int:
        return self.layout.length - self.layout.new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.layout.length, 0


class CachedModel:
    """A causal LM and the keys and values of the rows in flight.

    Rows are numbered from 0 without gaps. `lengths[r]` is how many tokens of row r the model has read.

    Args:
        model: in evaluation mode, with `sdpa` or `eager` attention.

    Raises:
        ValueError: a model whose cache does not keep one key a position (recurrent, chunked, shared), or another kind
            of attention.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        embedding: Any = model.get_input_embeddings()
        self.device: torch.device = embedding.weight.device
        self.windows = check_model(model)
        self.lengths: list[int] = []
        self._layout = Layout()
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._layers = [SlotLayer(self._layout) for _ in DynamicCache(config=model.config).layers]
        self._cache = Cache(layers=list(self._layers))

    @property
    def held(self) -> int:
        """Slots that the rows take now."""
        return sum(map(slots_for, self.lengths))

    def cost(self, row: int, more: int) -> int:
        """Slots that `more` further tokens of a row would add to `held`; a row that is not there yet holds nothing."""
        length = self.lengths[row] if row < len(self.lengths) else 0
        return slots_for(length + more) - slots_for(length)

    def add(self) -> None:
        """One row more, which has read nothing."""
        self.lengths.append(0)

    @torch.inference_mode()
    def drop(self, row: int) -> None:
        """Forget a row; the last row takes its number."""
        # The last row moves into the gap, so that rows stay numbered without one and most passes can use slices.
        last = len(self.lengths) - 1
        if row != last and self.lengths[last]:
            self._copy(last, row, self.lengths[last])
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:  # an idle batch holds no memory
            self._layout.capacity = (0, 0)
            for layer in self._layers:
                layer.reset()
        elif math.prod(self._layout.capacity) > SPARE * math.prod(self._needed()):
            self._fit(self._needed())

    def truncate(self, row: int, length: int) -> None:
        """Forget what follows a row's first `length` tokens; does nothing where it has read no more than that."""
        # A slot past the length is never shown before it is written again, so nothing needs to be cleared.
        self.lengths[row] = min(self.lengths[row], length)

    @torch.inference_mode()
    def wipe(self, row: int) -> None:
        """Zero what a row holds that may be NaN: what is masked is multiplied by 0, and 0 times NaN is NaN."""
        for layer in self._layers:
            if layer.is_initialized:
                layer.keys[row : row + 1] = 0
                layer.values[row : row + 1] = 0

    @torch.inference_mode()
    def share(self, source: int, targets: list[int], length: int) -> None:
        """Give rows that have read nothing the first `length` tokens of another row."""
        self._reserve(max(targets) + 1, length)
        self._copy(source, targets, length)
        for row in targets:
            self.lengths[row] = length

    @torch.inference_mode()
    def extend(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], *, hidden: bool = False, keep: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read the next tokens of some rows.

        Args:
            rows: ascending.
            tokens: at least one a row.
            hidden: whether to give the states too.
            keep: logits of how many tokens a row to give.

        Returns:
            Logits (R, V) after each row's last token, or (R, keep, V) after its last `keep` tokens where that is more
            than 1, aligned on the right (what stands before a row's first new token means nothing); if asked, the
            states (R, d) that the LM head got at the last token.
        """
        counts = [len(each) for each in tokens]
        # Nearly every step: one token a row needs no padding, so there is nothing to cut into passes.
        if max(counts) == 1 or len(rows) == 1:
            return self._forward(rows, tokens, counts, hidden, keep)
        order, results = [], []
        for part in forward_parts(counts):
            part.sort()
            order += part
            chosen = ([rows[i] for i in part], [tokens[i] for i in part], [counts[i] for i in part])
            results.append(self._forward(*chosen, hidden, keep))
        if len(results) == 1:
            return results[0]
        back = torch.tensor(order, device=self.device).argsort()
        logits, states = zip(*results, strict=True)
        return torch.cat(logits)[back], torch.cat(states)[back] if hidden else None

    def _forward(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], counts: list[int], hidden: bool, keep: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Tokens are aligned on the right, so that column -1 is the last token of every row. A row with fewer new tokens
        # than the widest has padding before them, whose positions may even be negative.
        at, lengths = self._layout, self.lengths
        width = max(counts)
        starts = [lengths[row] + count - width for row, count in zip(rows, counts, strict=True)]  # may be negative
        at.new, at.length = width, max(starts) + width
        self._reserve(rows[-1] + 1, at.length)
        even = min(counts) == width and min(starts) == max(starts)
        at.past = starts[0] if even else None
        at.part = slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else None
        # One transfer: ids beside the position of the first of them.
        table = torch.tensor(
            [[*[0] * (width - count), *each, start] for each, count, start in zip(tokens, counts, starts, strict=True)],
            device=self.device,
        )
        ids, positions = table[:, :-1], table[:, -1:] + torch.arange(width, device=self.device)
        mask: Any = None
        # What the layers need depends on how regular the pass is: nothing but a slice (even, adjacent), slots of every
        # token (even, apart), or slots and a mask (uneven).
        if not even or at.part is None:
            at.index = torch.tensor(list(rows), device=self.device)
        if not even:
            padding = (
                torch.arange(width, device=self.device) < width - torch.tensor(counts, device=self.device)[:, None]
            )
            at.slots = positions.masked_fill(padding, at.capacity[1])
            # Padding sees slot 0, because a row of a softmax that sees nothing is not a number.
            positions = positions.clamp(min=0)
            mask = self._masks(positions)
        elif at.part is None:
            at.slots = positions
        # The hook takes what the LM head reads. `output_hidden_states` would keep the states of all layers.
        caught: list[torch.Tensor] = []
        handle = (
            self.model.base_model.register_forward_hook(lambda _, __, out: caught.append(out.last_hidden_state[:, -1]))
            if hidden
            else None
        )
        try:
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                return_dict=True,
                **({"logits_to_keep": keep} if self._keeps else {}),
            )
        finally:
            if handle is not None:
                handle.remove()
        for row, count in zip(rows, counts, strict=True):
            lengths[row] += count
        # Of a model that is spread over devices, the last one gives the logits.
        logits = output.logits[:, -keep:].to(self.device)
        logits = logits[:, -1] if keep == 1 else pad(logits, (0, 0, keep - logits.shape[1], 0))
        return logits, caught[0].to(self.device) if hidden else None

    def _masks(self, positions: torch.Tensor) -> Any:
        """Which slots each new token sees, (R, 1, T, L); by kind of layer where the model has two kinds."""
        slots = torch.arange(self._layout.length, device=self.device)
        causal = slots <= positions[:, None, :, None]
        masks = {}
        for kind, window in self.windows.items():
            seen = causal if window is None else causal & (slots > positions[:, None, :, None] - window)
            if attention_of(self.model.config.get_text_config()) == "eager":  # adds the mask to its scores
                lowest = torch.finfo(self.model.dtype).min
                seen = torch.zeros_like(seen, dtype=self.model.dtype).masked_fill_(~seen, lowest)
            masks[kind] = seen
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _reserve(self, rows: int, slots: int) -> None:
        """Make room, if there is too little.

        New buffers fit the rows that are live now in both directions: many short rows that come after a long one do
        not get its length. With `drop`, what is held at any time is at most what the rows needed at the last copy.
        """
        held = self._layout.capacity
        if rows > held[0] or slots > held[1]:
            self._fit(self._needed(rows, slots))

    def _needed(self, rows: int = 0, slots: int = 0) -> tuple[int, int]:
        """Rows and slots for all rows in flight, at least these, and a little room."""
        # An eighth more rows and ROOM more slots than are needed: a batch that grows by a row or a token at a time must
        # not copy everything it holds at each step.
        live = max(rows, len(self.lengths))
        return live + live // 8, max([slots, *self.lengths]) + ROOM

    def _fit(self, capacity: tuple[int, int]) -> None:
        self._layout.capacity = capacity
        for layer in self._layers:
            if layer.is_initialized:
                layer.fit()

    def _copy(self, source: int, targets: int | list[int], length: int) -> None:
        for layer in self._layers:
            layer.copy(source, targets, length)


def slots_for(length: int) -> int:
    """Slots that a row of this many tokens takes."""
    return math.ceil(length / ROOM) * ROOM


def check_model(model: PreTrainedModel) -> dict[str, int | None]:
    """The kinds of attention layer of a model that `CachedModel` can run: sliding window in tokens, or None.

    Raises:
        ValueError: see `CachedModel`.
    """
    config: PreTrainedConfig = model.config.get_text_config()
    name = f"{type(model).__name__} (model_type {config.model_type!r})"
    windows: dict[str, int | None] = {}
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) is DynamicLayer:
            windows["full_attention"] = None
        elif type(layer) is DynamicSlidingWindowLayer:
            windows["sliding_attention"] = layer.sliding_window
        else:
            windows.clear()
            break
    if not windows or "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{name} keeps more than one key a position in its cache, which routed decoding on transformers cannot "
            "extend row by row: use a model with full or sliding-window attention."
        )
    if attention_of(config) not in ("sdpa", "eager"):
        raise ValueError(
            f"{name} was loaded with attn_implementation={attention_of(config)!r}, which takes no mask for rows "
            "of unequal length: load it with attn_implementation='sdpa'."
        )
    return windows


def forward_parts(counts: Sequence[int]) -> list[list[int]]:
    """Rows with these numbers of new tokens, cut into forward passes; gives indices into `counts`.

    A pass reads all weights, so few are better, but each of its rows is padded to the longest: short rows share one
    pass, and a long prompt does not drag rows that need one token along.
    """
    # Longest first, so that the first row of a part is its width and every later one is padded to it.
    parts: list[list[int]] = []
    width = real = 0
    for i in sorted(range(len(counts)), key=lambda i: -counts[i]):
        padded = width * (len(parts[-1]) + 1) if parts else 0
        fits = padded <= FORWARD_TOKENS and padded <= max(PADDING, PADDED_SHARE * (real + counts[i]))
        if not parts or not fits:
            parts.append([])
            width = counts[i]
            real = 0
        parts[-1].append(i)
        real += counts[i]
    return parts
