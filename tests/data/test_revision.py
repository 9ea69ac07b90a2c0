"""Revision prompts: filled once and as text, one text for the ledger world, and every unusable template refused."""

from __future__ import annotations

import json
import random
import re
import string

import pytest
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support import tiny_tokenizer
from tokalign.data.revision import (
    BUILT_IN,
    RevisionTemplates,
    load_templates,
    revision_prompt_ids,
    revision_prompts,
    templates_hash,
)
from tokalign.internals.trl import ids_of_dpo_trainer
from tokalign.prompts import PromptRendering, render_prompt
from tokalign.stage.errors import ContractError
from tokalign.worlds import ledger

PLAIN = RevisionTemplates("plain", "Q {prompt} A {completion} good.", "Q {prompt} A {completion} bad.")


def read(tokenizer, ids):
    return tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["general", "math", "code", "ledger"])
def test_built_in_templates_hold_question_and_answer_and_end_alike(name):
    assert {file.stem for file in BUILT_IN.glob("*.json")} == {"general", "math", "code", "ledger"}
    templates = load_templates(name)
    assert templates.name == name
    tokenizer = tiny_tokenizer()
    for prompt_format in ("chat", "raw"):
        for ids in revision_prompt_ids("the question", "the answer", templates, tokenizer, prompt_format):
            text = read(tokenizer, ids)
            assert "the question" in text and "the answer" in text and "{" not in text


@pytest.mark.parametrize("people", [1, 2])
def test_ledger_templates_are_the_ledger_worlds_own_prompts(people):
    config = ledger.LedgerConfig(people=people, min_events=2, max_events=3)
    tokenizer, templates, rng = ledger.build_tokenizer(config), load_templates("ledger"), random.Random(0)
    for problem in ledger.problems("train", 20, seed=1, config=config):
        for draft in (ledger.solution(problem), ledger.wrong_solution(problem, rng)):
            expected = [
                render_prompt(ledger.prompt(problem, draft=draft, request=request), tokenizer)
                for request in ("correct", "wrong")
            ]
            assert list(revision_prompt_ids(ledger.prompt(problem), draft, templates, tokenizer)) == expected


def test_fields_inside_prompt_and_completion_stay_what_they_are():
    tokenizer = tiny_tokenizer(alphabet="abcdefghijklmnopqrstuvwxyzQA .!{}_0")
    prompt, completion = "set {completion} and {0}", "{prompt} {completion.__class__} {x!r} {}"
    better, worse = revision_prompt_ids(prompt, completion, PLAIN, tokenizer, "raw")
    assert read(tokenizer, better) == f"Q {prompt} A {completion} good."
    assert read(tokenizer, worse) == f"Q {prompt} A {completion} bad."
    twice = RevisionTemplates("twice", "{prompt} {completion} {prompt} good", "{prompt} {completion} {prompt} bad")
    assert read(tokenizer, revision_prompt_ids("a", "b", twice, tokenizer, "raw")[0]) == "a b a good"


def test_the_last_user_message_becomes_the_template_and_earlier_turns_stay():
    tokenizer = tiny_tokenizer()
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "second"},
    ]
    before = json.dumps(messages)
    better, worse = revision_prompt_ids(messages, "done", PLAIN, tokenizer)
    start = "<|system|>be brief<|end|><|user|>first<|end|><|assistant|>so<|end|>"
    assert read(tokenizer, better) == start + "<|user|>Q second A done good.<|end|><|assistant|>"
    assert read(tokenizer, worse) == start + "<|user|>Q second A done bad.<|end|><|assistant|>"
    assert json.dumps(messages) == before
    assert revision_prompt_ids(messages[-1:], "done", PLAIN, tokenizer) == revision_prompt_ids(
        "second", "done", PLAIN, tokenizer
    )


def test_hash_is_of_the_texts():
    renamed = RevisionTemplates("other", PLAIN.better, PLAIN.worse)
    assert templates_hash(renamed) == templates_hash(PLAIN)
    swapped = RevisionTemplates("plain", PLAIN.worse, PLAIN.better)
    assert len({templates_hash(t) for t in (PLAIN, swapped, load_templates("general"), load_templates("math"))}) == 4


def test_templates_by_path(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"better": PLAIN.better, "worse": PLAIN.worse, "note": "ours"}))
    assert load_templates(file) == load_templates(str(file)) == RevisionTemplates("mine", PLAIN.better, PLAIN.worse)


# --- beside the policy's own prompt ------------------------------------------------------------------------------


def row_of(tokenizer, chosen, *, prompt=({"role": "user", "content": "q"},), **columns) -> dict:
    """A pair of messages or texts with the ids that DPOTrainer gives it."""
    rejected = chosen if isinstance(chosen, str) else [{"role": "assistant", "content": "no"}]
    prompt = prompt if isinstance(prompt, str) else list(prompt)
    pairs = Dataset.from_list([{"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}])
    return {"id": "p7"} | ids_of_dpo_trainer(pairs, tokenizer)[0]


def answer(content: str | None, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def revised(row, tokenizer, side="chosen") -> str:
    return read(tokenizer, revision_prompts(row, side, PLAIN, tokenizer)[0])


def test_an_end_token_behind_a_text_is_not_quoted():
    tokenizer = tiny_tokenizer()
    row = row_of(tokenizer, "yes", prompt="q")
    assert row["chosen"] == "yes<|end|>"  # TRL's
    assert revised(row, tokenizer) == "<|user|>Q q A yes good.<|end|><|assistant|>"
    row = row_of(tokenizer, "yes<|end|><|pad|>", prompt="q")  # of a user who wrote them
    assert revised(row, tokenizer) == "<|user|>Q q A yes good.<|end|><|assistant|>"


def test_every_turn_of_an_answer_is_quoted_as_the_model_writes_it():
    tokenizer = tiny_tokenizer()
    turns = [answer("five"), {"role": "user", "content": "sure?"}, answer("yes")]
    assert " A fivesure?yes good." in revised(row_of(tokenizer, turns), tokenizer)
    assert " A five good." in revised(row_of(tokenizer, turns[:1]), tokenizer)


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def test_a_call_of_tools_is_quoted_as_it_is_written_below_the_rows_own_tools():
    tokenizer = tiny_tokenizer(string.printable, kind="tools")
    row = row_of(tokenizer, [answer(None, tool_calls=[CALL])], tools=json.dumps(TOOLS))
    system = '<|system|>{"type": "function", "function": {"name": "add"}}<|end|>'
    call = '<call>{"arguments": {"a": 1}, "name": "add"}</call>'
    read_as = revised(row, tokenizer).replace('{"name": "add", "arguments": {"a": 1}}', call[6:-7])  # either order
    assert read_as == f"{system}<|user|>Q q A {call} good.<|end|><|assistant|>"
    assert read(tokenizer, row["prompt_ids"]) == f"{system}<|user|>q<|end|><|assistant|>"
    silent = tiny_tokenizer(string.printable)
    silent.chat_template = silent.chat_template.replace("message['content']", "message['content'] or ''")
    with pytest.raises(ContractError, match="Row 'p7': the chat template writes nothing of the messages in `chosen`"):
        revised(row_of(silent, [answer(None, tool_calls=[CALL])]), silent)


@pytest.mark.parametrize(
    ("kind", "variables", "end"),
    [
        ("thinking", None, "<|assistant|>"),
        ("thinking", {"enable_thinking": False}, "<|assistant|><think></think>"),
        ("thought left out", None, "<|assistant|>"),  # of the conversation, so of the policy's prompt
    ],
)
def test_both_prompts_end_alike_whatever_the_template_does_with_thoughts(kind, variables, end):
    tokenizer = tiny_tokenizer(string.printable, kind=kind)
    row = row_of(tokenizer, [answer("yes")], **({} if variables is None else {"chat_template_kwargs": variables}))
    assert read(tokenizer, row["prompt_ids"]) == "<|user|>q<|end|>" + end
    assert revised(row, tokenizer) == "<|user|>Q q A yes good.<|end|>" + end
    sampled = {**row, "prompt_ids": render_prompt("q", tokenizer, chat_template_kwargs=variables), "prompt": "q"}
    assert revised(sampled, tokenizer) == "<|user|>Q q A yes good.<|end|>" + read(tokenizer, sampled["prompt_ids"])[16:]


def test_a_dated_template_is_told_the_date_of_the_policys_prompt():
    tokenizer = tiny_tokenizer(kind="dated")
    rendering = PromptRendering(date="2026-02-03T04:05:06")
    row = {"id": "p7", "prompt": "q", "chosen": "yes", "prompt_ids": rendering.ids({"prompt": "q"}, tokenizer)}
    for ids in revision_prompts(row, "chosen", PLAIN, tokenizer, rendering):
        assert read(tokenizer, ids).startswith("<|system|>03 Feb 2026 04:05:06<|end|><|user|>Q q A yes ")


@pytest.mark.parametrize("role", ["assistant", "tool"])
def test_a_prompt_that_ends_with_another_turn_is_told_so(role):
    prompt = [{"role": "user", "content": "q"}, {"role": role, "content": "a"}]
    with pytest.raises(ContractError, match=f"does not end with a text of the user.*its last message is of `{role}`"):
        revision_prompt_ids(prompt, "a", PLAIN, tiny_tokenizer())


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no revision templates '.*mine\.json' \(No such file.*\); use one of code, general, ledger, math, or"),
        (b"{'better'", r"mine\.json is not JSON .*; write an object with `better` and `worse`"),
        (b"\xff\xfe\x00", r"mine\.json is not JSON .*; write an object"),
        (b"[1]", r"mine\.json is not a JSON object; write an object"),
        (b'{"better": "{prompt} {completion}"}', "'mine': `worse` is missing or not a text; write a text with"),
        (b'{"better": 3, "worse": ""}', "'mine': `better` is missing or not a text"),
        (b'{"better": "{prompt}", "worse": ""}', r"'mine': `better` lacks the field \{completion\}; put it where"),
        (b'{"better": "{prompt} {completion}", "worse": "{completion}"}', r"`worse` lacks the field \{prompt\}"),
        (
            b'{"better": "{prompt} {completion} {answer}", "worse": ""}',
            r"`better` has the unknown field \{answer\}; the fields are \{prompt\} and \{completion\}",
        ),
        (
            b'{"better": "{prompt} {completion}", "worse": "{prompt} {completion}"}',
            "`better` and `worse` are the same text, so every reward is 0; ask for opposite revisions",
        ),
    ],
)
def test_unusable_templates_are_one_sentence(tmp_path, content, message):
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ContractError, match=message):
        load_templates(file)


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ContractError, match=r"no revision templates 'maths' .*use one of code, general, ledger, math"):
        load_templates("maths")
    with pytest.raises(ContractError, match=re.escape(f"no revision templates '{tmp_path}' (Is a directory)")):
        load_templates(tmp_path)


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        [{"role": "user", "content": [{"type": "text", "text": "q"}]}],
    ],
)
def test_a_prompt_that_does_not_end_with_the_user_is_refused(prompt):
    with pytest.raises(ContractError, match=r"Row 'p7' .*`prompt` does not end with a text of the user"):
        revision_prompt_ids(prompt, "a", PLAIN, tiny_tokenizer(), name="'p7' (chosen)")


def test_what_render_prompt_refuses_is_refused():
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(ContractError, match="no chat template"):
        revision_prompt_ids("q", "a", PLAIN, bare)
    with pytest.raises(ContractError, match="`prompt` holds messages, which `raw` cannot render"):
        revision_prompt_ids([{"role": "user", "content": "q"}], "a", PLAIN, tiny_tokenizer(), "raw")


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Words with the space before them, as byte-level BPE has them, so what stands before a word is part of its id."""
    texts = ["Q: q A: a good bad: now nice Bot", "q", "a", "\n", "\n ", "  ", " a", "nice", "n", "ice", "badly", "Bot"]
    split = pre_tokenizers.Split(Regex(r" ?\w+|:|\s+"), "isolated")
    words = dict.fromkeys(piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<|unk|>", *words])}, unk_token="<|unk|>"))
    backend.pre_tokenizer = split
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<|unk|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} Bot:{% endif %}"
    )
    return tokenizer


def templates(better: str, worse: str) -> RevisionTemplates:
    head = "Q: {prompt} A: {completion}"
    return RevisionTemplates("mine", head + better, head + worse)


@pytest.mark.parametrize(
    ("better", "worse", "completion"),
    [
        (" good:", " bad: ", " nice"),  # a space at the end: the completion's own space has no place
        (" good", " bad", "ly nice"),  # the completion goes on with the last word of one
    ],
)
def test_raw_prompts_must_join_the_completion_alike(better, worse, completion):
    tokenizer = spaced_tokenizer()
    message = (
        "Row 'p7': the completion reads as other ids behind the revision prompt `better` than behind `worse` of "
        "'mine'; let both templates end in the same word and the same space"
    )
    with pytest.raises(ContractError, match=message):
        revision_prompt_ids("q", completion, templates(better, worse), tokenizer, "raw", name="'p7'")
    ends_alike = templates(better + " now:", worse + " now:")
    prompts = revision_prompt_ids("q", completion, ends_alike, tokenizer, "raw")
    tails = []
    for ids in prompts:
        joined = tokenizer(read(tokenizer, ids) + completion)["input_ids"]
        assert joined[: len(ids)] == ids
        tails.append(joined[len(ids) :])
    assert tails[0] == tails[1]


def test_chat_prompts_must_be_followed_by_the_same_ids():
    """Where no special token ends the user's message, its end can swallow what follows it."""
    tokenizer = spaced_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(" Bot", "{{ '\\n' }} Bot")
    with pytest.raises(ContractError, match=r"the generation prompt reads as other ids behind .*`better` than behind"):
        revision_prompt_ids("q", " a", templates(" good:", " bad:\n"), tokenizer)
    better, worse = revision_prompt_ids("q", " a", templates(" good:", " bad:"), tokenizer)
    assert read(tokenizer, better).endswith(" good:\n Bot:") and read(tokenizer, worse).endswith(" bad:\n Bot:")
