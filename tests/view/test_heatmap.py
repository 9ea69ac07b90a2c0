"""The heatmap shows exactly the tokens' text, marks the right ones, and lets nothing of a completion become markup."""

import math
from html.parser import HTMLParser

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support import ALPHABET, tiny_tokenizer
from tokalign.stage.errors import ContractError
from tokalign.stage.pieces import MAX_PENDING, token_pieces
from tokalign.view import heatmap
from tokalign.view.heatmap import Scale, token_heatmap

TEXT = "Ünïcode 🤖 café 🧮👩‍🔬 naïve\nline two — “quotes” 😀😀 end"


class Page(HTMLParser):
    """Start tags with attributes, and the text of every token, as a browser would read them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.tokens, self.depth, self.scripts, self.in_script = [], [], 0, [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.in_script = tag == "script"
        if tag == "script":
            self.scripts.append("")
        if tag == "span" and "t" in (attributes.get("class") or "").split():
            self.tokens.append({"text": "", **attributes})
            self.depth = 1

    def handle_endtag(self, tag):
        self.in_script = False
        if tag == "span":
            self.depth = 0

    def handle_data(self, data):
        if self.in_script:
            self.scripts[-1] += data
        elif self.depth:
            self.tokens[-1]["text"] += data


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Byte-level BPE with few merges: every emoji and most accents are split over several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.fixture(scope="module")
def sentencepiece_tokenizer():
    """Llama-2's layout: ▁ for spaces, the first one stripped, and one token a byte of an unknown character."""
    words = ["<unk>", "</s>", "▁", "▁Hello", "▁world", "lo", "\n", ".", *(f"<0x{i:02X}>" for i in range(256))]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def test_pieces_of_a_plain_tokenizer_are_its_tokens():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("3 + 4 = 7\n#### 7")["input_ids"] + [tokenizer.eos_token_id]
    assert token_pieces(tokenizer, ids) == [*"3 + 4 = 7\n#### 7", "<|end|>"]
    assert token_pieces(tokenizer, []) == []


def test_pieces_of_split_characters_join_to_the_text(byte_tokenizer):
    ids = byte_tokenizer(TEXT)["input_ids"]
    pieces = token_pieces(byte_tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == byte_tokenizer.decode(ids) == TEXT
    assert "" in pieces  # some character is split, or this tests nothing
    assert "\ufffd" not in "".join(pieces)


@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, 299), max_size=MAX_PENDING - 1))
def test_pieces_of_any_bytes_join_to_the_decoded_ids(byte_tokenizer, ids):
    pieces = token_pieces(byte_tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == byte_tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=60))
def test_pieces_of_any_text_join_to_it(byte_tokenizer, text):
    ids = byte_tokenizer(text)["input_ids"]
    assert "".join(token_pieces(byte_tokenizer, ids)) == byte_tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_truncated_character_is_shown_where_it_is(byte_tokenizer):
    first_byte = byte_tokenizer("🤖")["input_ids"][:1]
    letter = byte_tokenizer("x")["input_ids"]
    assert token_pieces(byte_tokenizer, letter + first_byte + letter) == ["x", "\ufffd", "x"]
    assert token_pieces(byte_tokenizer, letter + first_byte) == ["x", "\ufffd"]


def test_long_runs_of_bytes_that_are_no_text_end_and_keep_one_piece_a_token(byte_tokenizer):
    ids = byte_tokenizer("🤖")["input_ids"][:1] * 500 + byte_tokenizer("done 🤖")["input_ids"]
    pieces = token_pieces(byte_tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces).endswith("done 🤖")


def test_sentencepiece_spaces_and_byte_tokens(sentencepiece_tokenizer):
    tokenizer = sentencepiece_tokenizer
    emoji = [f"<0x{byte:02X}>" for byte in "😀😀".encode()]
    tokens = ["▁Hello", "▁world", "▁", *emoji, ".", "\n", "▁Hello", "lo"]
    ids = tokenizer.convert_tokens_to_ids(tokens)
    pieces = token_pieces(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "Hello world 😀😀.\n Hellolo"
    assert pieces[:3] == ["Hello", " world", " "] and pieces[3:11] == ["", "", "", "😀"] * 2


def _row(tokenizer, text="1 + 1 = 3", **columns):
    ids = tokenizer(text)["input_ids"]
    scores = [1.0 - i / len(ids) for i in range(len(ids))]
    return {
        "id": "p0",
        "prompt": "q",
        "answer": "2",
        "prompt_ids": ids[:2],
        "chosen_ids": ids,
        "rejected_ids": ids,
        "chosen_contrast": [1.0] * len(ids),
        "rejected_contrast": scores,
        **columns,
    }


def test_page_holds_every_token_value_and_mark():
    tokenizer = tiny_tokenizer()
    row = _row(tokenizer, first_error=8, critical_index=6, rejected_entropy=[0.12345678] * 9)
    page = Page(token_heatmap([row], tokenizer, extract=lambda text: text[-1]))
    chosen, rejected = page.tokens[:9], page.tokens[9:]
    assert "".join(t["text"] for t in rejected) == "1 + 1 = 3"
    assert [i for i, t in enumerate(rejected) if "err" in t["class"].split()] == [8]
    assert [i for i, t in enumerate(rejected) if "roll" in t["class"].split()] == [6]
    assert not any({"err", "roll"} & set(t["class"].split()) for t in chosen)
    title = rejected[8]["title"]
    assert f"id {row['rejected_ids'][8]}" in title and "position 8" in title
    assert "contrast 0.1111" in title and "entropy 0.1235" in title and "true first error" in title
    assert "entropy –" in chosen[0]["title"]  # the chosen side was not scored
    assert rejected[8]["data-s"].split()[0] == "s9" and rejected[0]["data-s"].split()[0] == "s0"  # low is strong


@pytest.mark.parametrize("unknown", [-1, None])
def test_unknown_marks_are_not_drawn(unknown):
    tokenizer = tiny_tokenizer()
    html = token_heatmap([_row(tokenizer, first_error=unknown, critical_index=unknown)], tokenizer)
    assert not any({"err", "roll"} & set(t["class"].split()) for t in Page(html).tokens)
    assert "true first error" not in html


def test_page_is_alone_and_works_from_the_keyboard():
    html = token_heatmap([_row(tiny_tokenizer())], tiny_tokenizer())
    page = Page(html)
    assert not any(name in attrs for _, attrs in page.tags for name in ("src", "href", "srcset", "style-src"))
    assert "http://" not in html and "https://" not in html
    assert any("default-src 'none'" in (attrs.get("content") or "") for _, attrs in page.tags)
    boxes = [attrs for _, attrs in page.tags if attrs.get("class") == "toks"]
    assert len(boxes) == 2 and all(box["tabindex"] == "0" for box in boxes)


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "</script><img src=x onerror=alert(1)>",
        "\" onmouseover='x' x=\"",
        "</span></div><h1>",
        "<!-- {{ title }} {% raw %}",
        "&lt;b&gt;",
    ],
)
def test_completion_never_becomes_markup(hostile):
    tokenizer = tiny_tokenizer(ALPHABET + "{}%&_!")
    clean = Page(token_heatmap([_row(tokenizer, "x" * len(hostile), chosen_notes={"a": "b"})], tokenizer))
    words = tokenizer(hostile)["input_ids"]
    row = _row(tokenizer, hostile, id=hostile, answer=hostile, prompt=hostile, prompt_ids=words)
    row["chosen_notes"] = {hostile: hostile}
    page = Page(token_heatmap([row], tokenizer, title=hostile, extract=lambda text: text))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in clean.tags]
    assert {name for _, attrs in page.tags for name in attrs} == {name for _, attrs in clean.tags for name in attrs}
    assert "".join(t["text"] for t in page.tokens) == hostile * 2
    assert page.scripts == clean.scripts


def test_one_token_of_markup_is_escaped_in_text_and_title():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<script>": 1, '"><i>': 2}, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    page = Page(token_heatmap([{"id": "a", "chosen_ids": [1, 2], "chosen_x": [0.0, 1.0]}], tokenizer))
    assert [t["text"] for t in page.tokens] == ["<script>", '"><i>']
    assert page.tokens[1]["title"].startswith(r'"\"><i>" · id 2')
    assert len(page.scripts) == 1


def test_line_breaks_controls_and_empty_pieces_are_visible(byte_tokenizer):
    ids = byte_tokenizer("a\n\x07\u202eb🤖")["input_ids"]
    html = token_heatmap([{"id": "a", "chosen_ids": ids, "chosen_x": [0.5] * len(ids)}], byte_tokenizer)
    assert '<i class="nl"></i>\n' in html and "\u2407" in html
    assert "\x07" not in html and "\u202e" not in html
    assert '<i class="part"></i>' in html


def test_a_mark_stands_on_the_line_that_its_token_begins_on(byte_tokenizer):
    """A browser places it at the first box in the token; a box with a line break in it ends a line lower."""
    assert heatmap._marked_piece_markup("\n") == '<b><i class="nl"></i></b>\n'
    assert (
        heatmap._marked_piece_markup("<.\n\n 7")
        == '<b>&lt;.<i class="nl"></i></b>\n<b><i class="nl"></i></b>\n<b> 7</b>'
    )
    assert heatmap._marked_piece_markup("") == '<b><i class="part"></i></b>'
    ids = byte_tokenizer("a\nb")["input_ids"]
    row = {"id": "a", "rejected_ids": ids, "rejected_contrast": [0.5] * len(ids), "first_error": 1}
    html = token_heatmap([row], byte_tokenizer)
    assert '<b><i class="nl"></i></b>\n</span>' in html and html.count("<b><") == 1
    assert "".join(t["text"] for t in Page(html).tokens) == "a\nb"


def _steps(values: list[float], name: str = "logprob") -> tuple[list[str], str]:
    row = {"id": "a", "chosen_ids": [10] * len(values), f"chosen_{name}": values}
    html = token_heatmap([row], tiny_tokenizer())
    return [t["class"].split()[1] for t in Page(html).tokens], html


@pytest.mark.parametrize("bad", [[-1e4], [-1e4, 5e3], [-1e30, -1e4]])
def test_a_bad_outlier_does_not_blank_the_page(bad):
    sound = [-0.05 * i for i in range(80)]
    alone, html = _steps(sound)
    assert len(set(alone)) == 11 and "beyond" not in html
    beside, html = _steps([*sound, *bad])
    assert beside[:80] == alone
    assert f"{len(bad)} of {80 + len(bad)} values beyond, to " in html and "≤ -3.95" in html  # the legend says so
    assert "logprob -1e+04" in html  # and the token its own value


@pytest.mark.parametrize("values", [[0.0] * 30 + [2.0, 2.5], [0.01 * i for i in range(50)] + [2.0], [0.0, 5.0]])
def test_values_that_are_few_or_not_so_far_keep_the_whole_scale(values):
    assert heatmap._ends(values) == (min(values), max(values))


def test_values_outside_a_known_range_are_counted_in_the_legend():
    steps, html = _steps([0.5, 1.5, -3.0, 0.0], "contrast")
    assert steps == ["s5", "s0", "s10", "s10"]
    assert "≤ 0 <" in html and "≥ 1" in html and "2 of 4 values beyond, to -3 and 1.5" in html


def test_fragment_is_part_of_the_page():
    rows = [_row(tiny_tokenizer())]
    fragment = token_heatmap(rows, tiny_tokenizer(), fragment=True)
    assert "<html" not in fragment and fragment.strip() in token_heatmap(rows, tiny_tokenizer())


def test_pages_of_a_dataset():
    tokenizer = tiny_tokenizer()
    dataset = Dataset.from_list([_row(tokenizer, id=f"p{i}") for i in range(5)])
    page = token_heatmap(dataset, tokenizer, start=3, limit=10)
    assert "Rows 3–4 of 5" in page and ">p3<" in page and ">p2<" not in page
    with pytest.raises(ContractError, match="no row 5 to show: the dataset has 5 rows"):
        token_heatmap(dataset, tokenizer, start=5)


@pytest.mark.parametrize(
    ("value", "scale", "step"),
    [
        (0.0, Scale(0, 1, "low"), "s10"),
        (1.0, Scale(0, 1, "low"), "s0"),
        (0.7, Scale(0, 1, "high"), "s7"),
        (9.0, Scale(0, 1, "high"), "s10"),
        (-0.5, Scale(-0.5, 0.5, "both"), "s10"),
        (0.2, Scale(-0.5, 0.5, "both"), "p4"),
        (0.0, Scale(-0.5, 0.5, "both"), "s0"),
        (None, Scale(0, 1, "low"), "s0"),
        (3.0, Scale(3, 3, "high"), "s0"),
    ],
)
def test_values_become_steps(value, scale, step):
    assert heatmap._step(value, scale) == step


@pytest.mark.parametrize(
    ("signal", "values", "steps"),
    [
        ("contrast", [0.0, 0.5, 1.0], ["s10", "s5", "s0"]),
        ("entropy", [0.0, 1.0, 4.0], ["s0", "s2", "s10"]),  # high is suspicious, and has no end
        ("logprob", [-4.0, -1.0, 0.0], ["s10", "s2", "s0"]),
        ("token_reward", [-0.5, 0.0, 0.1], ["s10", "s0", "p2"]),
        ("nameless", [-1.0, 0.0, 4.0], ["s2", "s0", "p10"]),  # registered nowhere: one scale on both sides of 0
    ],
)
def test_the_table_of_signals_says_what_is_strong(signal, values, steps):
    row = {"id": "a", "chosen_ids": [10, 11, 12], f"chosen_{signal}": values}
    html = token_heatmap([row], tiny_tokenizer())
    assert [t["class"].split()[1] for t in Page(html).tokens] == steps
    assert ("its suspicious end are unknown" in html) == (signal == "nameless")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_contrast": [0.5]}, r"Row 1 \(id 'bad'\): `rejected_contrast` has 1 scores for 9 ids; score"),
        ({"rejected_contrast": [math.nan] * 9}, r"Row 1 \(id 'bad'\): `rejected_contrast` holds nan at position 0"),
        ({"rejected_contrast": [0.5] * 8 + [-math.inf]}, "`rejected_contrast` holds -inf at position 8, not a finite"),
        ({"first_error": 9}, r"Row 1 \(id 'bad'\): `first_error` is 9, outside the completion's 9 tokens"),
        ({"critical_index": -2}, "`critical_index` is -2, outside"),
        ({"chosen_first_error": 12}, "`chosen_first_error` is 12, outside"),
        ({"chosen_ids": [10**6] * 9}, "`chosen_ids` holds id 1000000, but the tokenizer has"),
        ({"chosen_ids": [], "chosen_contrast": []}, "`chosen_ids` is empty; drop the row"),
        ({"chosen_ids": None, "rejected_ids": None}, "has none of the columns `chosen_ids`, `rejected_ids`"),
    ],
)
def test_bad_rows_are_one_sentence(change, message):
    tokenizer = tiny_tokenizer()
    rows = [_row(tokenizer), _row(tokenizer, id="bad") | change]
    with pytest.raises(ContractError, match=message) as error:
        token_heatmap(rows, tokenizer)
    assert "\n" not in str(error.value)


def test_missing_signals_are_named():
    tokenizer = tiny_tokenizer()
    row = {"id": "a", "chosen_ids": [10]}
    with pytest.raises(ContractError, match="has no signal column"):
        token_heatmap([row], tokenizer)
    with pytest.raises(ContractError, match="no signal 'entropy'"):
        token_heatmap([_row(tokenizer)], tokenizer, signals=["contrast", "entropy"])
