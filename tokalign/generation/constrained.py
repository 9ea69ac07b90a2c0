"""Constrained decoding: before a token is drawn, the ids that no document of a JSON Schema can go on with are masked.

xgrammar (arXiv 2411.15100) or llguidance keeps the grammar. This file tells them what each id *spells*. The entries of
a byte-level or byte-fallback vocabulary are their own spelling. Other vocabularies (WordLevel, WordPiece, Unigram)
leave part of the text to the tokenizer's decoder, e.g. the spaces between words: a library that reads their entries as
they stand takes `1` `2` for the number 12, but the two decode to "1 2". There, an id spells what the decoder appends
for it after a word.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tokalign.internals.transformers import bytes_to_unicode

GRAMMARS_KEPT = 1024  # compiled schemas an engine; a data set may have one a row
# A number that has begun and cannot end here.
_OPEN_NUMBER = re.compile(rb"\s*(-?\d*\.|[-+]|-?\d*\.?\d*[eE][-+]?)")


class Matcher(Protocol):
    """Where one completion is in its document."""

    def fill(self, bits: torch.Tensor, row: int) -> None:
        """Set the bits of the ids that may come next, in row `row` of int32 (B, ceil(V / 32))."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on by one id that was allowed."""
        ...


class Grammars:
    """The grammars of one model: each schema is compiled once, each completion gets a matcher of its own.

    Args:
        backend: "xgrammar" or "llguidance".
        tokenizer: the model's, a fast one.
        vocab_size: width V of the model's logits.
        end_ids: ids that end a completion; they are allowed when the document is whole.

    Raises:
        ImportError: the library is not installed. ValueError: a tokenizer that it cannot take.
    """

    def __init__(self, backend: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_ids: list[int]):
        if importlib.util.find_spec(backend) is None:
            raise ImportError(f"json_schema needs {backend}: install tokalign[constrained].")
        make = _xgrammar if backend == "xgrammar" else _llguidance
        self._start = make(_fast(tokenizer), vocab_size, end_ids)
        self._words = -(-max(vocab_size, len(tokenizer)) // 32)  # llguidance fills a bit for every id of the tokenizer

    def matcher(self, schema: str, prompt: int) -> Matcher:
        """A matcher at the start of a document.

        Args:
            schema: JSON text of the schema.
            prompt: its row, for the error.

        Raises:
            ValueError: the library cannot make a grammar of the schema.
        """
        try:
            return self._start(schema)
        except (ValueError, RuntimeError) as error:
            raise refused(prompt, error) from error

    def mask_(self, logits: torch.Tensor, matchers: Sequence[Matcher | None], prompts: Sequence[int]) -> None:
        """Put −inf, in place, on the ids that each row's document cannot go on with.

        Args:
            logits: (B, V), −inf where an id is banned.
            matchers: B of them; None for a row without a schema, and for one whose document is done.
            prompts: B numbers of prompts, for the error.

        Raises:
            ValueError: a schema and the bans together leave a row no id.
        """
        # The libraries fill one bit an id. All bits are set at first, so a row without a matcher is not masked.
        bits = torch.full((len(matchers), self._words), -1, dtype=torch.int32)
        bound = [k for k, matcher in enumerate(matchers) if matcher is not None]
        for k in bound:
            matchers[k].fill(bits, k)  # type: ignore[union-attr]
        places = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = (bits.to(logits.device)[:, :, None] >> places) & 1
        logits.masked_fill_(allowed.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)
        # Sampling from a row of −inf would give any id at all.
        dead = (logits.amax(-1) == -torch.inf).tolist()
        for k in bound:
            if dead[k]:
                raise ValueError(
                    f"Prompt {prompts[k]} has come to a place where no token is left that its json_schema allows and "
                    "that is not banned: lift the ban, or use a tokenizer that can spell the document."
                )


def refused(prompt: int, error: Exception) -> ValueError:
    """What to raise for a library's `error` about the schema of row `prompt`."""
    return ValueError(
        f"Prompt {prompt} has a json_schema that cannot be decoded by ({_reason(error)}): correct it, or try the other "
        "grammar_backend."
    )


# --- what ids spell --------------------------------------------------------------------------------------------------


def is_byte_encoded(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether every vocabulary entry is an encoding of its own bytes, which grammar libraries read by themselves."""
    decoder = tokenizer.backend_tokenizer.decoder
    return decoder is not None and any(kind in decoder.__getstate__() for kind in (b"ByteLevel", b"ByteFallback"))


def spellings(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> tuple[list[bytes], bool]:
    """What each id of a vocabulary that is not byte-encoded spells, and whether words bring the space before them.

    Returns:
        One entry an id, empty if it spells nothing or may never be used in a document; and the answer.
    """
    size = min(vocab_size, len(tokenizer))
    special = _special(tokenizer)
    names = tokenizer.convert_ids_to_tokens(list(range(size)))
    word = next((i for i, name in enumerate(names) if i not in special and name.isascii() and name.isalpha()), 0)

    def decode(ids: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    (before,) = decode([[word]])
    alone, after = decode([[i] for i in range(size)]), decode([[word, i] for i in range(size)])
    texts = [
        text[len(before) :].encode() if i not in special and text.startswith(before) else b""
        for i, text in enumerate(after)
    ]
    spaced = any(text == b" " + first.encode() for text, first in zip(texts, alone, strict=True) if text.strip())
    if not any(text[:1].isdigit() for text in texts):
        # Each number is one token and none can be continued: one that is left open would be a dead end.
        texts = [b"" if _OPEN_NUMBER.fullmatch(text) else text for text in texts]
    return texts + [b""] * (vocab_size - size), spaced


def spelled_out(tokenizer: PreTrainedTokenizerBase, folder: str) -> bool:
    """Write, for vLLM, a byte-level tokenizer whose entries spell what the ids of `tokenizer` do.

    vLLM takes a vocabulary's entries as they stand. The copy has the same ids and special tokens; it decodes a
    completion to the same text up to spaces around punctuation, and its encoding must not be used.

    Returns:
        Whether a copy was needed and written.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or is_byte_encoded(tokenizer):
        return False
    texts, _ = spellings(tokenizer, len(tokenizer))
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = _special(tokenizer)
    if all(i in special or name.encode() == texts[i] for i, name in enumerate(names)):
        return False
    from tokenizers import Tokenizer, decoders, models

    letters = bytes_to_unicode()
    vocabulary: dict[str, int] = {}
    for i, name in enumerate(names):
        spelled = name if i in special else "".join(letters[byte] for byte in texts[i])
        # Byte 0 can stand nowhere in a JSON document, so these are never allowed.
        vocabulary[f"{letters[0]}{i}" if not spelled or spelled in vocabulary else spelled] = i
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map).save_pretrained(folder)
    return True


def needs_leading_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the id of a word spells a space before it; the decoder leaves out the one before the first word."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or is_byte_encoded(tokenizer):
        return False
    return spellings(tokenizer, len(tokenizer))[1]


# --- the two libraries -----------------------------------------------------------------------------------------------


def check_llguidance(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that llguidance cannot take.

    It encodes the text that a grammar forces, and its masks are wrong where the vocabulary cannot spell that text.
    """
    if isinstance(tokenizer, PreTrainedTokenizerFast) and not is_byte_encoded(tokenizer):
        raise ValueError("grammar_backend=llguidance takes byte-level and byte-fallback tokenizers only: use xgrammar.")


def ebnf(schema: str, *, leading_space: bool) -> str:
    """xgrammar's grammar of a schema; with `leading_space` a document begins with the space of its first word.

    A piece that continues a word (`##12`, `@@3`) then cannot come first, where it would decode to its bare name.
    """
    import xgrammar

    grammar = xgrammar.Grammar.from_json_schema(schema)
    if leading_space:
        grammar = xgrammar.Grammar.concat(xgrammar.Grammar.from_ebnf('root ::= " "'), grammar)
    # In a string of bounded length xgrammar 0.2 allows raw control characters, which JSON does not.
    return str(grammar).replace(r"""[^\"\\\r\n]""", r"""[^\0-\x1f\"\\\r\n]""")


class _XGrammarMatcher:
    def __init__(self, compiled: Any):
        from xgrammar import GrammarMatcher

        self._matcher = GrammarMatcher(compiled)

    def fill(self, bits: torch.Tensor, row: int) -> None:
        self._matcher.fill_next_token_bitmask(bits, row)

    def accept(self, token_id: int) -> None:
        assert self._matcher.accept_token(token_id)


class _LLGuidanceMatcher:
    def __init__(self, compiled: Any):
        self._matcher = compiled.deep_copy()

    def fill(self, bits: torch.Tensor, row: int) -> None:
        self._matcher.unsafe_compute_mask_ptr(bits[row].data_ptr(), 4 * bits.shape[1])
        if self._matcher.is_error():  # its parser has limits, and would go on with the end token alone
            raise ValueError(f"llguidance gave up on a json_schema ({_reason(self._matcher.get_error())}).")

    def accept(self, token_id: int) -> None:
        assert self._matcher.consume_token(token_id)


def _xgrammar(tokenizer: PreTrainedTokenizerFast, vocab_size: int, end_ids: list[int]) -> Any:
    import xgrammar

    spaced = False
    if is_byte_encoded(tokenizer):
        known = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size).decoded_vocab
        # Inside a string a special token would pass for the text of its name.
        special = _special(tokenizer)
        texts = [b"" if i in special else text for i, text in enumerate(known)]
    else:
        texts, spaced = spellings(tokenizer, vocab_size)
    info = xgrammar.TokenizerInfo(texts, vocab_size=vocab_size, stop_token_ids=end_ids)
    compiler = xgrammar.GrammarCompiler(info, cache_enabled=False)

    @lru_cache(GRAMMARS_KEPT)
    def compiled(schema: str) -> Any:
        return compiler.compile_grammar(ebnf(schema, leading_space=spaced))

    return lambda schema: _XGrammarMatcher(compiled(schema))


def _llguidance(tokenizer: PreTrainedTokenizerFast, vocab_size: int, end_ids: list[int]) -> Any:
    import llguidance
    from llguidance.hf import from_tokenizer

    check_llguidance(tokenizer)
    known = from_tokenizer(tokenizer, n_vocab=max(vocab_size, len(tokenizer)), eos_token=end_ids)

    @lru_cache(GRAMMARS_KEPT)
    def compiled(schema: str) -> Any:
        matcher = llguidance.LLMatcher(known, llguidance.LLMatcher.grammar_from_json_schema(schema), log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    return lambda schema: _LLGuidanceMatcher(compiled(schema))


def _special(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added}


def _fast(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"json_schema needs a fast tokenizer, not {type(tokenizer).__name__}: use engine=vllm.")
    return tokenizer


def _reason(error: object) -> str:
    """A library's message in one line, without the place in its source."""
    return " ".join(re.sub(r"^\[[\d:]+\] \S+: ", "", str(error)).split())[:300].rstrip(".")
