"""Token heatmap: a signals dataset as one self-contained HTML page, every completion token coloured by its score.

A token signal is one number a completion token, bound to token ids. The page shows the ids themselves: each token is
one box whose text is its piece of the decoded completion, and pointing at it (or moving to it with the arrow keys)
gives text, id, position and every signal's value. Known true errors and the rollout estimate's critical token are
marked by shape, not by colour alone. Model output is untrusted: all of it passes through jinja2's autoescape, the
page has a content policy without network, and its script reads text only, never markup.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from transformers import PreTrainedTokenizerBase

from tokalign.signals.registry import known
from tokalign.stage.contract import SIDES
from tokalign.stage.errors import ContractError
from tokalign.stage.pieces import token_pieces

STEPS = 10  # colour steps of a scale
FAR = 4  # an end of a scale further off the other values than so many times their spread would leave them 2 of 10 steps
# Shown in place of characters that HTML cannot hold, that would be invisible, or that reorder the text around them.
_CONTROL = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"}
_CONTROL |= {code: "\u2421" for code in (0x7F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


class Rows(Protocol):
    """What is read of the rows: a `datasets.Dataset` or a list of dicts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Scale:
    """How a signal's numbers become colour.

    Attributes:
        low, high: values at the ends; None takes them from the rows shown, but for a few far outliers (`_ends`).
        strong: "low" colours small values (critical tokens have a low contrastive score), "high" large ones, and
            "both" goes from one hue below 0 over none at 0 to another hue above.
        meaning: what a strong colour says, for the legend.
    """

    low: float | None = None
    high: float | None = None
    strong: Literal["low", "high", "both"] = "high"
    meaning: str = ""


UNKNOWN = "its range and its suspicious end are unknown: tell them with tokalign.signals.register"


def scale_of(name: str, least: float, most: float) -> Scale:
    """How the table of signals has a signal coloured: its suspicious end strongly, or both ways from 0.

    One that nobody has registered is coloured by its smallest and largest value, and the legend says so.
    """
    signal = known(name)
    if signal is None:
        return Scale(strong="both" if least < 0 < most else "high", meaning=UNKNOWN)
    low, high = (end if math.isfinite(end) else None for end in (signal.low, signal.high))
    has_sign = signal.low < 0 < signal.high and signal.suspicious == "low"
    return Scale(low, high, "both" if has_sign else signal.suspicious, signal.meaning)


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    # str(): decode is typed for batches too.
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))


def token_heatmap(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    signals: Sequence[str] | None = None,
    sides: Sequence[str] = SIDES,
    title: str = "Token heatmap",
    start: int = 0,
    limit: int = 50,
    scales: Mapping[str, Scale] | None = None,
    extract: Callable[[str], str | None] | None = None,
    fragment: bool = False,
) -> str:
    """One HTML page of completions coloured token by token.

    Args:
        rows: rows of a signals dataset: `id`, `prompt`, `<side>_ids`, `<side>_<signal>`; shown where present:
            `prompt_ids`, `answer`, `first_error` (index of the true first wrong token), `critical_index` (the rollout
            estimate's); these two are the rejected side's, or `<side>_first_error` …; None and -1 are unknown; and
            `<side>_notes`, names and texts that stand above the completion.
        tokenizer: the one that made the ids.
        signals: names without a side; unset shows every list of numbers found. The first one colours the page.
        sides: completions to show; one absent from the rows is left out.
        start, limit: the page shows rows `start` to `start + limit`, so that it stays small enough to open.
        scales: colour scale of a signal, where another is wanted than the table of signals gives (`scale_of`).
        extract: reads the final answer out of a completion's text, for the row's header.
        fragment: only `<style>`, `<section>` and `<script>`, to be put into another page (once a page).

    Raises:
        ContractError: a signal whose length is not its ids', a NaN, an index outside the completion, an id outside the
            vocabulary, or nothing to show; one sentence naming row and column.
    """
    if start < 0 or limit < 1:
        raise ContractError(f"start is {start} and limit {limit}: show at least one row, from row 0 on.")
    shown = [rows[i] for i in range(start, min(start + limit, len(rows)))]
    if not shown:
        raise ContractError(f"There is no row {start} to show: the dataset has {len(rows)} rows, choose another start.")
    names = list(signals) if signals is not None else _find_signals(shown, sides)
    if not names:
        raise ContractError(
            f"Row {start} has no signal column (a list of numbers named like `rejected_contrast`): "
            "score the dataset first, or name the signals."
        )
    for name in names:
        if not any(row.get(f"{side}_{name}") is not None for row in shown for side in sides):
            raise ContractError(
                f"Rows {start} to {start + len(shown) - 1} have no signal {name!r} for {' or '.join(sides)}: "
                "score the dataset first, or name another signal."
            )
    blocks = [_read_row(row, start + i, tokenizer, names, sides, extract) for i, row in enumerate(shown)]
    tokens = [token for block in blocks for side in block["sides"] for token in side["tokens"]]
    fitted, legends = [], []
    for i, name in enumerate(names):
        values = [token["values"][i] for token in tokens if token["values"][i] is not None]
        fitted.append(_fit(name, values, scales or {}))
        legends.append(_legend(name, fitted[-1], values))
    for token in tokens:
        token["steps"] = [_step(value, scale) for value, scale in zip(token["values"], fitted, strict=True)]
        token["title"] = _title(token, names)
    template = _environment().get_template("heatmap.html" if fragment else "heatmap_page.html")
    return template.render(
        title=title,
        rows=blocks,
        legends=legends,
        first=start,
        last=start + len(blocks) - 1,
        total=len(rows),
        error_known=any(token["error"] for token in tokens),
        critical_known=any(token["critical"] for token in tokens),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tokalign.view"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["piece"] = _piece_markup
    environment.filters["marked_piece"] = _marked_piece_markup
    return environment


def _piece_markup(piece: str) -> Markup:
    """A token's text: a mark before each line break, visible stand-ins for control characters and for no text."""
    if not piece:
        return Markup('<i class="part"></i>')
    return escape(piece.translate(_CONTROL)).replace("\n", Markup('<i class="nl"></i>\n'))


def _marked_piece_markup(piece: str) -> Markup:
    """A token's text with each of its lines in a box of its own, so that its mark stands on the line it begins on.

    A box that goes on after a line break has its place, to a browser, where its last line ends.
    """
    *broken, rest = piece.split("\n")
    boxes = [Markup('<b>{}<i class="nl"></i></b>\n').format(_piece_markup(line) if line else "") for line in broken]
    if rest or not broken:
        boxes.append(Markup("<b>{}</b>").format(_piece_markup(rest)))
    return Markup("").join(boxes)


def _find_signals(rows: Sequence[Mapping[str, Any]], sides: Sequence[str]) -> list[str]:
    signals: dict[str, None] = {}
    for row in rows:
        for side in sides:
            for column, value in row.items():
                if (
                    column.startswith(f"{side}_")
                    and column != f"{side}_ids"
                    and isinstance(value, Sequence)
                    and not isinstance(value, str)
                    and all(isinstance(v, float) or v is None for v in value)
                    and len(value)
                ):
                    signals.setdefault(column.removeprefix(f"{side}_"))
    return list(signals)


def _read_row(
    row: Mapping[str, Any],
    number: int,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    sides: Sequence[str],
    extract: Callable[[str], str | None] | None,
) -> dict[str, Any]:
    where = f"Row {number} (id {row.get('id', number)!r})"
    special = set(tokenizer.all_special_ids)
    blocks = []
    for side in sides:
        ids = row.get(f"{side}_ids")
        if ids is None:
            continue
        _check_ids(ids, f"{side}_ids", where, len(tokenizer))
        values = [_read_signal(row.get(f"{side}_{name}"), len(ids), f"{side}_{name}", where) for name in names]
        error = _read_index(row, "first_error", side, len(ids), where)
        critical = _read_index(row, "critical_index", side, len(ids), where)
        tokens = []
        for position, (token_id, piece) in enumerate(zip(ids, token_pieces(tokenizer, ids), strict=True)):
            tokens.append(
                {
                    "id": token_id,
                    "position": position,
                    "piece": piece,
                    # A token without text of its own is named as the vocabulary writes it.
                    "name": piece or str(tokenizer.convert_ids_to_tokens(token_id)),
                    "special": token_id in special,
                    "values": [column[position] for column in values],
                    "error": position == error,
                    "critical": position == critical,
                }
            )
        text = _text(tokenizer, ids, skip_special_tokens=True)
        notes = row.get(f"{side}_notes") or {}
        answer = extract(text) if extract else None
        blocks.append({"name": side, "tokens": tokens, "answer": answer, "notes": notes})
    if not blocks:
        raise ContractError(
            f"{where} has none of the columns {', '.join(f'`{side}_ids`' for side in sides)}: "
            "show a preferences dataset, or name the sides that it has."
        )
    return {
        "number": number,
        "id": str(row.get("id", number)),
        "answer": row.get("answer"),
        "prompt": _prompt_text(row, tokenizer),
        "sides": blocks,
        "extracted": extract is not None,
    }


def _check_ids(ids: Sequence[int], column: str, where: str, vocabulary: int) -> None:
    if len(ids) == 0:
        raise ContractError(f"{where}: `{column}` is empty; drop the row, or rebuild the pairs.")
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocabulary:
        raise ContractError(
            f"{where}: `{column}` holds id {low if low < 0 else high}, but the tokenizer has {vocabulary} tokens; "
            "use the tokenizer that made these ids."
        )


def _read_signal(values: Sequence[float] | None, length: int, column: str, where: str) -> Sequence[float | None]:
    if values is None:
        return [None] * length
    if len(values) != length:
        raise ContractError(f"{where}: `{column}` has {len(values)} scores for {length} ids; score these rows again.")
    for position, value in enumerate(values):
        if value is None or not math.isfinite(value):
            raise ContractError(
                f"{where}: `{column}` holds {value} at position {position}, not a finite number; "
                "score these rows again."
            )
    return values


def _read_index(row: Mapping[str, Any], name: str, side: str, length: int, where: str) -> int | None:
    """Token index in `<side>_<name>`, or in `<name>`, which is the rejected side's; None and -1 are unknown."""
    columns = (f"{side}_{name}", name) if side == "rejected" else (f"{side}_{name}",)
    column = next((column for column in columns if row.get(column) is not None), None)
    if column is None or row[column] == -1:
        return None
    if not 0 <= row[column] < length:
        raise ContractError(
            f"{where}: `{column}` is {row[column]}, outside the completion's {length} tokens; "
            "compute it again from these ids."
        )
    return int(row[column])


def _prompt_text(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    if row.get("prompt_ids") is not None:  # what the model saw, chat template included
        return _text(tokenizer, row["prompt_ids"])
    prompt = row.get("prompt") or ""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _fit(name: str, values: Sequence[float], given: Mapping[str, Scale]) -> Scale:
    """The signal's scale with both ends set, from the values shown where the scale leaves one open."""
    least, most = _ends(values)
    scale = given.get(name) or scale_of(name, least, most)
    low = least if scale.low is None else scale.low
    high = most if scale.high is None else scale.high
    if scale.strong == "both":  # no colour belongs at 0, so both ends are equally far from it
        high = max(abs(low), abs(high))
        low = -high
    return Scale(low, high, scale.strong, scale.meaning)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest of some values, without those at an end, at most one and 2 %, that lie far off the rest.

    One score of −10,000 among log-probs of −0.1 to −9 would make all of these one colour.
    """
    if not values:
        return 0.0, 1.0
    ordered, cut = sorted(values), 1 + len(values) // 50
    least, most = ordered[0], ordered[-1]
    if len(ordered) <= 2 * cut or ordered[cut] == ordered[-1 - cut]:  # no rest, or one value: outliers are all there is
        return least, most
    low, high = ordered[cut], ordered[-1 - cut]
    far = FAR * (high - low)
    return next(v for v in ordered if low - v <= far), next(v for v in reversed(ordered) if v - high <= far)


def _step(value: float | None, scale: Scale) -> str:
    """CSS class of a value: s1 … s10 (one hue), p1 … p10 (the other hue, above 0), or s0 for no colour."""
    low, high = scale.low or 0.0, scale.high or 0.0
    if value is None or high <= low:
        return "s0"
    if scale.strong == "both":
        step = round(STEPS * max(-1.0, min(1.0, value / high)))
        return f"p{step}" if step > 0 else f"s{-step}"
    share = max(0.0, min(1.0, (value - low) / (high - low)))
    return f"s{round(STEPS * (1 - share if scale.strong == 'low' else share))}"


def _title(token: Mapping[str, Any], names: Sequence[str]) -> str:
    parts = [json.dumps(token["name"], ensure_ascii=False), f"id {token['id']}", f"position {token['position']}"]
    for name, value in zip(names, token["values"], strict=True):
        parts.append(f"{name} {'–' if value is None else format(value, '.4g')}")
    if token["error"]:
        parts.append("true first error")
    if token["critical"]:
        parts.append("critical token by rollouts")
    return " · ".join(parts).translate(_CONTROL)


def _legend(name: str, scale: Scale, values: Sequence[float]) -> dict[str, Any]:
    low, high = scale.low or 0.0, scale.high or 0.0
    below, above = [v for v in values if v < low], [v for v in values if v > high]
    farthest = [format(end, ".3g") for end in ([min(below)] if below else []) + ([max(above)] if above else [])]
    steps = [f"s{i}" for i in range(STEPS + 1)]
    if scale.strong == "low":
        steps.reverse()
    elif scale.strong == "both":
        steps = [f"s{i}" for i in range(STEPS, 0, -2)] + ["s0"] + [f"p{i}" for i in range(2, STEPS + 1, 2)]
    return {
        "name": name,
        "low": f"{'≤ ' if below else ''}{low:.3g}",
        "high": f"{'≥ ' if above else ''}{high:.3g}",
        "beyond": f"{len(below) + len(above)} of {len(values)} values beyond, to {' and '.join(farthest)}"
        if farthest
        else "",
        "meaning": scale.meaning,
        "steps": steps,
    }
