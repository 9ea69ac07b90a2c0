"""Two models kept in step: a causal LM with a KV cache in which every row has its own length.

Slot j of a row holds position j (of a sliding-window layer, slot p modulo their number holds position p), so rows need
no common length, nothing is ever padded or trimmed, a row can be given another's slots, and what a row has read last
can be forgotten. Rows are kept by size class, each class in one buffer a layer: a long row does not widen the short
ones. A forward pass extends any subset of the rows, each by any number of tokens, laid side by side
(`row_attention.py`).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from tokalign.internals.transformers import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    attention_of,
    attention_set,
    configs_of,
    takes_attention,
)
from tokalign.routing.decode.row_attention import GATHERED, NAME, SLACK, Kind, Layout, Piece, SlotLayer

ROOM = 64  # tokens that a row which is let in should have room for
SMALLEST = 256  # slots of the smallest class: each class in a pass costs attention a call of its own
SPARE = 4  # a class gives places back when more than 1 in this many, and 1 more, are empty
FORWARD_TOKENS = 16384  # most tokens in one forward pass
PROBE = 0.2  # largest relative difference of logits from the model's own that is still rounding


@dataclass
class Row:
    """One row of a cache.

    Attributes:
        size: its class, by slots; 0 while it has read nothing.
        place: in the buffer of its class.
        written: slots written so far; more than its length after something was forgotten.
        ids: what it has read, kept for models that may have to read it anew.
        long: whether it was read with the frequencies for long texts (longrope).
    """

    size: int = 0
    place: int = 0
    written: int = 0
    ids: list[int] = field(default_factory=list)
    long: bool = False


class CachedModel:
    """A causal LM and the keys and values of the rows in flight.

    Rows are numbered from 0 without gaps. `lengths[r]` is how many tokens of row r the model has read. `switch` is the
    length from which longrope takes other frequencies (None: another model).

    Args:
        model: in evaluation mode, with `sdpa` or `eager` attention; a PEFT model runs with the adapter that is active.

    Raises:
        ValueError: a model whose cache does not keep one key a position (recurrent, shared), or another kind of
            attention.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        kinds = layer_kinds(model)
        self.model: Any = _unwrapped(model)
        embedding: Any = self.model.get_input_embeddings()
        self.device: torch.device = embedding.weight.device
        self.lengths: list[int] = []
        self._rows: list[Row] = []
        self._members: dict[int, list[int]] = {}  # of each class, the row at each place
        self._configs = configs_of(self.model)
        config = self.model.config.get_text_config()
        self._layout = Layout(eager=attention_of(config) == "eager")
        self._window = max((kind.window for kind in kinds if kind.window is not None), default=None)
        self.switch = _longrope_switch(config)
        # Llama 4 takes positions from what the cache says stands before, and not from those that it is given.
        self._places_from_cache = getattr(config, "attn_temperature_tuning", False)
        # accelerate moves tensors to the first device, and what is chosen from stands on the last.
        self._spread = len({*getattr(self.model, "hf_device_map", {}).values()}) > 1
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._layers = [SlotLayer(self._layout, kind) for kind in kinds]
        self._cache = Cache(layers=list(self._layers))

    @property
    def held(self) -> int:
        """Slots that the rows take now; of each class the buffers have up to a quarter and one row more.

        Sliding layers take their window only.
        """
        return sum(row.size for row in self._rows)

    def cost(self, row: int, more: int) -> int:
        """Slots that `more` further tokens of a row would add to `held`; a row that is not there yet holds nothing."""
        if row >= len(self.lengths):
            return slots_for(more)
        return max(0, slots_for(self.lengths[row] + more) - self._rows[row].size)

    def add(self) -> None:
        """One row more, which has read nothing."""
        self.lengths.append(0)
        self._rows.append(Row())

    @torch.inference_mode()
    def drop(self, row: int) -> None:
        """Forget a row; the last row takes its number."""
        gone = self._rows[row]
        self._vacate(gone)
        self._shrink(gone.size)
        last = self._rows.pop()
        length = self.lengths.pop()
        if row < len(self._rows):
            self._rows[row], self.lengths[row] = last, length
            if last.size:
                self._members[last.size][last.place] = row

    def truncate(self, row: int, length: int) -> None:
        """Forget what follows a row's first `length` tokens; does nothing where it has read no more than that.

        A sliding layer may have given up what the row needs to go on from there: then the row forgets everything, and
        its length is 0. That is never so within `row_attention.SLACK` tokens.
        """
        # A slot past the length is never shown before it is written again, so nothing needs to be cleared.
        if length < self.lengths[row]:
            if not self._intact(row, length):
                self._rows[row].written = length = 0
            self.lengths[row] = length
            del self._rows[row].ids[length:]

    @torch.inference_mode()
    def wipe(self, row: int, start: int = 0) -> None:
        """Zero what a row holds from its token `start` on, which may be NaN: 0 times NaN is NaN, also where masked."""
        state = self._rows[row]
        if not start:
            self._clear(state)
            return
        for layer in self._layers:
            for buffer in layer.buffers.get(state.size, ()):
                slots = torch.arange(start, max(start, state.written), device=buffer.device) % buffer.shape[2]
                buffer[state.place][:, slots] = 0

    @torch.inference_mode()
    def share(self, source: int, targets: list[int], length: int) -> None:
        """Give rows that have read nothing the first `length` tokens of another row.

        They stay empty where a sliding layer of that row has given up what they need.
        """
        if not self._intact(source, length):
            return
        self._place(dict.fromkeys(targets, length))
        given = self._rows[source]
        for target in targets:
            self.lengths[target] = length
            row = self._rows[target]
            row.ids, row.written, row.long = given.ids[:length], given.written, given.long
        places = [(self._rows[target].size, self._rows[target].place) for target in targets]
        # Where a sliding layer has wrapped, the window is anywhere in its slots.
        self._copy(given, places, length if self._window is None else given.written, length)

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
        todo = {row: list(each) for row, each in zip(rows, tokens, strict=True)}
        # longrope has one set of frequencies for texts up to a length and one for longer texts, and takes that of the
        # longest row of a pass. So each kind of row has passes of its own, and a row that crosses is read anew.
        groups: list[list[int]] = [list(todo)]
        if self.switch is not None:
            groups = [[], []]
            for row, new in todo.items():
                state, whole = self._rows[row], self.lengths[row] + len(new)
                long = whole > self.switch
                if self.lengths[row] and long != state.long:
                    todo[row] = state.ids + new
                    self.lengths[row], state.ids = 0, []
                state.long = long
                state.ids += todo[row]
                groups[long].append(row)
        results: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        for group in filter(None, groups):
            # Nearly always all rows fit in one pass.
            for part, ends in self._passes(group, todo, keep):
                logits, states = self._forward(part, hidden, keep)
                if len(part) == len(todo) == len(ends):
                    return logits, states
                for i, row in enumerate(part):
                    if row in ends:
                        results[row] = logits[i], states[i] if states is not None else None
        chosen = [results[row] for row in rows]
        states = torch.stack([cast(torch.Tensor, each[1]) for each in chosen]) if hidden else None
        return torch.stack([each[0] for each in chosen]), states

    def _passes(
        self, rows: list[int], todo: dict[int, list[int]], keep: int
    ) -> list[tuple[dict[int, list[int]], set[int]]]:
        """Forward passes of at most FORWARD_TOKENS tokens: the tokens of each row, and the rows that end there."""
        passes: list[tuple[dict[int, list[int]], set[int]]] = [({}, set())]
        room = FORWARD_TOKENS
        for row in rows:
            left = todo[row]
            while left:
                take = min(len(left), room)
                # The last `keep` tokens come in one pass, and a text of longrope's in one.
                if len(left) - keep < take < len(left):
                    take = len(left) - keep
                if take < len(left) and (take <= 0 or self.switch is not None):
                    take = len(left) if room == FORWARD_TOKENS else 0
                if take > 0:
                    passes[-1][0][row], left = left[:take], left[take:]
                    room -= take
                if left:
                    passes.append(({}, set()))
                    room = FORWARD_TOKENS
                else:
                    passes[-1][1].add(row)
        return [each for each in passes if each[0]]

    def _forward(self, todo: dict[int, list[int]], hidden: bool, keep: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One pass; logits and states of the rows in the order of `todo`."""
        lengths = self.lengths
        self._place({row: lengths[row] + len(new) for row, new in todo.items()})
        # Rows that are adjacent in a buffer and have equally many tokens come together, so that attention reads them
        # as one block. Rows with many tokens go alone: their attention is work enough.
        order = sorted(todo, key=lambda row: (len(todo[row]), self._rows[row].size, self._rows[row].place))
        width = self._layers[0].width

        def joins(before: int, row: int) -> bool:
            """Whether a row is read together with the one before it."""
            # In place where they are adjacent. Else their keys must be gathered, which on a CPU soon costs more than a
            # call for each; on a GPU each call is a launch, and a copy of the keys costs little beside it.
            adjacent = self._rows[row].place == self._rows[before].place + 1
            return adjacent or self.device.type != "cpu" or width * lengths[row] <= GATHERED

        groups: list[list[int]] = []
        ids: list[int] = []
        positions: list[int] = []
        ends: dict[int, int] = {}  # of each row, the token of the pass after its last
        pieces: list[Piece] = []
        for row in order:
            new, state, start = todo[row], self._rows[row], lengths[row]
            first = len(ids)
            ids += new
            positions += range(start, start + len(new))
            ends[row] = len(ids)
            lengths[row] = start + len(new)
            state.written = max(state.written, lengths[row])
            last = pieces[-1] if pieces else None
            if last and last.size == state.size and last.new == len(new) <= SLACK and joins(groups[-1][-1], row):
                groups[-1].append(row)
                last.tokens = slice(last.tokens.start, len(ids))
                last.ends.append(lengths[row])
            else:
                groups.append([row])
                pieces.append(Piece(state.size, slice(0), slice(first, len(ids)), [lengths[row]], len(new)))
        for piece, members in zip(pieces, groups, strict=True):
            places = [self._rows[row].place for row in members]
            if places[-1] - places[0] == len(places) - 1:
                piece.places = slice(places[0], places[-1] + 1)
            else:
                piece.places = torch.tensor(places, device=self.device)
        self._layout.pieces = pieces
        table = torch.tensor([ids, positions], device=self.device)
        kept = [
            max(end - back, end - len(todo[row]))
            for row, end in ((r, ends[r]) for r in todo)
            for back in range(keep, 0, -1)
        ]
        index = torch.tensor(kept, device=self.device)
        if self._places_from_cache:
            self._layout.before = table[1] - torch.arange(len(ids), device=self.device)
        # The hook takes what the LM head reads. `output_hidden_states` would keep the states of all layers.
        caught: list[torch.Tensor] = []
        handle = (
            self.model.base_model.register_forward_hook(lambda _, __, out: caught.append(out.last_hidden_state))
            if hidden
            else None
        )
        try:
            with attention_set(self._configs, NAME):
                output = self.model(
                    input_ids=table[:1],
                    position_ids=table[1:],
                    past_key_values=self._cache,
                    use_cache=True,
                    return_dict=True,
                    **({"logits_to_keep": kept if self._spread else index} if self._keeps else {}),
                )
        finally:
            if handle is not None:
                handle.remove()
        # Of a model that is spread over devices, the last one gives the logits.
        logits = output.logits[0].to(self.device)
        if not self._keeps:
            logits = logits[index]
        if keep > 1:
            logits = logits.unflatten(0, (len(todo), keep))
        return logits, caught[0][0].to(self.device)[index[keep - 1 :: keep]] if hidden else None

    def _intact(self, row: int, length: int) -> bool:
        """Whether sliding layers still have what follows from a row's first `length` tokens."""
        written = self._rows[row].written
        if self._window is None or not length:
            return True
        kept = Kind(self._window).slots(self._rows[row].size)
        return written <= kept or length - self._window >= written - kept

    def _place(self, ends: dict[int, int]) -> None:
        """Give rows a place in the class of their new lengths, moving what they hold."""
        moving = {row: size for row, end in ends.items() if (size := slots_for(end)) > self._rows[row].size}
        # Room for all that come, with an eighth to spare: a batch that grows by a row at a time must not copy
        # everything at each step.
        for size, more in Counter(moving.values()).items():
            live = len(self._members.setdefault(size, [])) + more
            if live > self._layout.capacity.get(size, 0):
                self._fit(size, live + live // 8)
        left: set[int] = set()
        for row, size in moving.items():
            state, members = self._rows[row], self._members[size]
            old = Row(state.size, state.place)
            state.size, state.place = size, len(members)
            members.append(row)
            if old.size:
                length = self.lengths[row] if self._window is None else state.written
                self._copy(old, [(size, state.place)], length, self.lengths[row])
                self._clear(old)
                self._vacate(old)
                left.add(old.size)
        for size in left:
            self._shrink(size)

    def _vacate(self, row: Row) -> None:
        """Free a place; the last row of the class moves into it."""
        if not row.size:
            return
        members = self._members[row.size]
        last = members.pop()
        if row.place < len(members):
            moved = self._rows[last]
            self._copy(moved, [(row.size, row.place)], moved.written, moved.written)
            self._clear(moved)
            moved.place, members[row.place] = row.place, last

    def _clear(self, row: Row) -> None:
        """Zero a place. Whoever moves leaves zeros, since it is not known yet whether what it held are numbers."""
        for layer in self._layers:
            for buffer in layer.buffers.get(row.size, ()):
                buffer[row.place] = 0

    def _shrink(self, size: int) -> None:
        """Give back places that a class has too many of."""
        live, capacity = len(self._members.get(size, ())), self._layout.capacity.get(size, 0)
        if capacity and (not live or capacity - live > live // SPARE + 1):
            self._fit(size, live)

    def _fit(self, size: int, places: int) -> None:
        self._layout.capacity[size] = places
        for layer in self._layers:
            layer.fit(size)

    def _copy(self, source: Row, targets: list[tuple[int, int]], slots: int, length: int) -> None:
        """Copy the first slots of a row: `slots` in sliding layers, `length` in the others."""
        for layer in self._layers:
            layer.copy((source.size, source.place), targets, length if layer.kind.window is None else slots)


def slots_for(length: int) -> int:
    """Slots that a row of this many tokens takes: SMALLEST times 1, 1.5, 2, 3, 4, 6 …, so at most half too many."""
    if not length:
        return 0
    size = SMALLEST << ((length - 1) // SMALLEST).bit_length()
    return 3 * size // 4 if size > SMALLEST and length <= 3 * size // 4 else size


def layer_kinds(model: PreTrainedModel | PeftModel) -> list[Kind]:
    """What each attention layer of a model that `CachedModel` can run sees.

    Raises:
        ValueError: see `CachedModel`.
    """
    inner: Any = _unwrapped(model)
    config: PreTrainedConfig = inner.config.get_text_config()
    name = f"{type(inner).__name__} (model_type {config.model_type!r})"
    layers = DynamicCache(config=inner.config).layers
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    kinds = [
        Kind(layer.sliding_window, chunked) if isinstance(layer, DynamicSlidingWindowLayer) else Kind()
        for layer in layers
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
    ]
    if len(kinds) < len(layers):
        raise ValueError(
            f"{name} keeps more than one key a position in its cache, which routed decoding on transformers cannot "
            "extend row by row: use a model with full or sliding-window attention."
        )
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        raise ValueError(
            f"{name} takes no position_ids, so routed decoding on transformers cannot tell it where the tokens of "
            "several rows stand: use a model with rotary or learned positions."
        )
    if not takes_attention(inner):
        raise ValueError(
            f"{name} computes its attention in its own code, which routed decoding on transformers cannot give rows of "
            "unequal length: use a model that takes transformers' AttentionInterface."
        )
    if attention_of(config) not in ("sdpa", "eager"):
        raise ValueError(
            f"{name} was loaded with attn_implementation={attention_of(config)!r}, which takes no mask for rows "
            "of unequal length: load it with attn_implementation='sdpa'."
        )
    return kinds


@torch.inference_mode()
def check_model(model: PreTrainedModel | PeftModel) -> None:
    """Refuse a model that `CachedModel` cannot run: by its configuration, and by what it computes.

    Two short rows are read side by side and compared with the model's own forward passes, because a family may take
    positions, masks or earlier tokens from elsewhere than from what it is given.

    Raises:
        ValueError: see `CachedModel`; or logits that are not those of the model itself.
    """
    cached = CachedModel(model)
    vocabulary = cached.model.config.get_text_config().vocab_size
    texts = [[(7 * i + start) % vocabulary for i in range(count)] for start, count in ((3, 9), (5, 6))]
    for text in texts:
        cached.add()
        cached.extend([len(cached.lengths) - 1], [text[:4]])
    logits, _ = cached.extend([0, 1], [text[4:] for text in texts], keep=2)
    got = logits.double()
    own = torch.stack([model(input_ids=torch.tensor([text], device=cached.device)).logits[0, -2:] for text in texts])
    want = own.to(got)
    off = float((got - want).norm() / want.norm())
    # What is not a number is a row's own error when it comes: the weights may be at fault.
    if off > PROBE:
        raise ValueError(
            f"{type(cached.model).__name__} gives other logits for a row beside another than alone ({off:.2f} of their "
            "size apart), so routed decoding on transformers cannot batch it: use another family of models."
        )


def _unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model that an adapter sits in.

    Raises:
        ValueError: an adapter that is a prompt of its own and not in the layers.
    """
    if not isinstance(model, PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"The adapter {model.active_adapter!r} is a learned prompt ({model.peft_type}), which routed decoding does "
            "not put before its rows: use a LoRA adapter, or merge it."
        )
    return cast(PreTrainedModel, model.get_base_model())


def _longrope_switch(config: PreTrainedConfig) -> int | None:
    """Length from which longrope takes the frequencies for longer texts; None for other models."""
    given = getattr(config, "rope_parameters", None) or {}
    for each in (given, *given.values()):
        if isinstance(each, dict) and each.get("rope_type") == "longrope":
            return int(each["original_max_position_embeddings"])
    return None
