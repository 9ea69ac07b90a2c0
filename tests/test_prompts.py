"""One prompt, one rendering: TRL's own for every row, with one date a stage, recorded and compared."""

from __future__ import annotations

import copy
import json
import string
from datetime import datetime

import pytest
from datasets import Dataset
from datasets.fingerprint import Hasher
from tokenizers import processors
from transformers import AutoTokenizer

from tests.support import TEMPLATES, tiny_tokenizer
from tokalign.cli.evaluate import EvaluateArguments
from tokalign.generation.arguments import SamplingArguments
from tokalign.internals.trl import ids_of_dpo_trainer
from tokalign.prompts import (
    RECORD,
    PromptArguments,
    PromptRendering,
    TemplateArguments,
    dated,
    give_variables,
    merged,
    now,
    recorded_beside,
    render_prompt,
    rendering_of,
    tell_the_date,
    template_hash,
)
from tokalign.stage.errors import ContractError, JobError
from tokalign.stage.hashes import tokenizer_hash
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest, write_manifest
from tokalign.trainers.prompts import note_prompts, training_prompts

DATE = "2026-02-03T04:05:06"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ASKED = [{"role": "user", "content": "2 + 3?"}]


def tokenizer_of(kind: str):
    tokenizer = tiny_tokenizer(string.printable, kind=kind)
    if kind == "system":  # and a beginning that the tokenizer adds to texts
        tokenizer.bos_token = "<|user|>"
        begin = processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 2)])
        tokenizer.backend_tokenizer.post_processor = begin
    return tokenizer


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS, json.dumps(TOOLS)])
def test_rows_become_the_ids_that_dpo_trainer_gives_them(kind, tools):
    row = {"prompt": ASKED, "chat_template_kwargs": {"enable_thinking": False}, "tools": tools}
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    tokenizer = tokenizer_of(kind)
    tell_the_date(tokenizer, DATE)
    rows = Dataset.from_list([{**row, **sides}])  # read back, since some versions of it sort the keys of objects
    (trl,) = ids_of_dpo_trainer(rows, tokenizer)
    ours = PromptRendering(date=DATE).ids(rows[0], tokenizer_of(kind))
    left_out = "<think></think>" if kind == "thought left out" else ""  # by TRL: it is in no conversation
    assert tokenizer.decode(ours) == tokenizer.decode(trl["prompt_ids"]) + left_out
    assert ours[: len(trl["prompt_ids"])] == trl["prompt_ids"]
    assert ("add" in tokenizer.decode(ours)) == (kind == "tools" and tools is not None)


def test_texts_become_the_ids_that_dpo_trainer_gives_them():
    tokenizer = tokenizer_of("system")
    (trl,) = ids_of_dpo_trainer(Dataset.from_list([{"prompt": "ab", "chosen": "c", "rejected": "d"}]), tokenizer)
    assert PromptRendering("raw").ids({"prompt": "ab"}, tokenizer) == trl["prompt_ids"]


def test_a_rows_own_variables_come_first_and_what_arrow_fills_in_is_none():
    assert merged({"a": 1, "b": None}, {"a": 2, "b": 3, "c": 4}) == {"a": 1, "b": 3, "c": 4}
    rows = Dataset.from_list([{"chat_template_kwargs": {"a": 1, "b": None}}, {"chat_template_kwargs": None}])
    given = give_variables(rows, {"a": 2, "b": 3})
    assert given["chat_template_kwargs"] == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]
    for some in (rows, rows.to_iterable_dataset()):  # TRL stops at None, which rows without the column hold
        assert all(row["chat_template_kwargs"] is not None for row in give_variables(some, None))
    with pytest.raises(ContractError, match=r"Row 0: `chat_template_kwargs` is '\{\}'; write an object"):
        give_variables(Dataset.from_list([{"chat_template_kwargs": "{}"}]), None)
    tokenizer = tokenizer_of("thinking")
    silent = PromptRendering(chat_template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(silent.ids({"prompt": "x"}, tokenizer)) == "<|user|>x<|end|><|assistant|><think></think>"
    own = {"prompt": "x", "chat_template_kwargs": {"enable_thinking": True}}
    assert tokenizer.decode(silent.ids(own, tokenizer)) == "<|user|>x<|end|><|assistant|>"


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_template_without_a_system_role_says_so_and_names_the_row():
    system = [{"role": "system", "content": "be brief"}, *ASKED]
    with pytest.raises(
        ContractError, match=r"Row 'p1': .* no place for a system message \(no such role\); put its text"
    ):
        PromptRendering().ids({"id": "p1", "prompt": system}, tokenizer_of("no system role"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ContractError, match=r"Row 'p1': .*refuses these messages \(roles must alternate; roles user\)"):
        PromptRendering().ids({"id": "p1", "prompt": ASKED}, tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "[{"}, "Row 'p1': `tools` is not JSON"),
        ({"chat_template_kwargs": "{}"}, "Row 'p1': `chat_template_kwargs` is '{}'; write an object"),
        ({"chat_template_kwargs": {"a": 1, "tokenize": True}}, "Row 'p1': .* cannot set `tokenize`; leave it out"),
        ({"prompt": []}, "Row 'p1': `prompt` has no message"),
    ],
)
def test_unusable_columns_are_one_sentence(row, message):
    with pytest.raises(ContractError, match=message):
        PromptRendering().ids({"id": "p1", "prompt": ASKED, **row}, tiny_tokenizer())


@pytest.mark.parametrize(
    ("given", "message"),
    [("{", "is not JSON"), ("[1]", "write a JSON object"), ('{"tokenize": false}', "cannot set `tokenize`")],
)
def test_unusable_arguments_are_one_sentence(given, message):
    for arguments in (TemplateArguments, PromptArguments, SamplingArguments):
        with pytest.raises(ContractError, match=message):
            arguments(chat_template_kwargs=given)
    assert SamplingArguments(chat_template_kwargs='{"a": false}').chat_template_kwargs == {"a": False}


# --- the date -----------------------------------------------------------------------------------------------------


def test_a_dated_template_is_told_one_date():
    tokenizer = tokenizer_of("dated")
    expected = "<|system|>03 Feb 2026 04:05:06<|end|><|user|>x<|end|><|assistant|>"
    assert tokenizer.decode(PromptRendering(date=DATE).ids({"prompt": "x"}, tokenizer)) == expected
    assert render_prompt("x", tokenizer) == render_prompt("x", tokenizer)  # of this process


@pytest.mark.parametrize("text", ["%d %b %Y", "%-d.%-m.%y", "%%d", "100%% %H", "%A %e %B", "plain", "%j%p%I"])
def test_the_date_is_written_as_strftime_writes_it(text):
    tokenizer = tiny_tokenizer(string.printable)
    inside = "{% macro say(how) %}{{ strftime_now(how) }}{% endmacro %}"
    tokenizer.chat_template = (
        inside + "\n  {% if strftime_now is defined %}[{{ say('" + text + "') }}]{% endif %}\n  end"
    )
    told = copy.copy(tokenizer)
    tell_the_date(told, DATE)
    read = told.apply_chat_template(ASKED, tokenize=False)
    assert f"[{datetime.fromisoformat(DATE).strftime(text)}]" in read
    undated = tokenizer.chat_template.replace("strftime_now(how)", "how")
    plain = tokenizer.apply_chat_template(ASKED, chat_template=undated, tokenize=False)
    assert read.partition("[")[0] == plain.partition("[")[0] and read.rpartition("]")[2] == plain.rpartition("]")[2]
    assert dated(dated(tokenizer.chat_template, DATE), now()) == dated(tokenizer.chat_template, DATE)


def test_a_told_tokenizer_is_the_same_to_stages_and_another_to_the_cache_of_datasets(tmp_path):
    tokenizer = tokenizer_of("dated")
    told = [copy.copy(tokenizer) for _ in range(3)]
    for one, date in zip(told, (DATE, DATE, "2026-02-04T00:00:00"), strict=True):
        tell_the_date(one, date)
    hashes = [Hasher.hash(one) for one in (tokenizer, *told)]
    assert hashes[1] == hashes[2] and len(set(hashes)) == 3
    assert tokenizer_hash(told[0]) == tokenizer_hash(tokenizer)
    told[0].save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == TEMPLATES["dated"]


def test_a_resumed_job_and_whoever_follows_it_take_its_date(tmp_path):
    tokenizer = tokenizer_of("dated")
    first = rendering_of(PromptArguments(), tokenizer, folder=tmp_path / "stage")
    assert first.date is not None
    record = first.record(tokenizer) | {"date": DATE}
    write_manifest(tmp_path / "stage", {RECORD: record})
    assert rendering_of(PromptArguments(), tokenizer, folder=tmp_path / "stage").date == DATE
    assert rendering_of(PromptArguments(), tokenizer, recorded=record, folder=tmp_path / "other").date == DATE
    assert rendering_of(PromptArguments(), tokenizer_of("plain"), folder=tmp_path / "stage").date is None


# --- recorded and compared -----------------------------------------------------------------------------------------


def test_where_the_arguments_are_silent_the_record_is_followed_and_a_difference_is_told(caplog):
    tokenizer = tokenizer_of("thinking")
    record = PromptRendering("chat", {"enable_thinking": False}).record(tokenizer)
    followed = rendering_of(PromptArguments(), tokenizer, recorded=record, must_agree=True)
    assert followed == PromptRendering("chat", {"enable_thinking": False})
    raw = PromptRendering("raw").record(tokenizer)  # by no template, whatever that is
    assert rendering_of(PromptArguments(), tokenizer_of("plain"), recorded=raw, must_agree=True).format == "raw"
    assert rendering_of(PromptArguments(), tokenizer) == PromptRendering()
    other = PromptArguments(chat_template_kwargs={"enable_thinking": True})
    with pytest.raises(ContractError, match=r"otherwise than those of pairs .*true.*there .*false.*; leave out"):
        rendering_of(other, tokenizer, recorded=record, of="pairs", must_agree=True)
    assert rendering_of(other, tokenizer, recorded=record).chat_template_kwargs == {"enable_thinking": True}
    assert "otherwise than those of the model" in caplog.text
    chat = PromptRendering().record(tokenizer)
    with pytest.raises(ContractError, match=f"template {template_hash(tokenizer_of('plain'))[:12]}"):
        rendering_of(PromptArguments(), tokenizer_of("plain"), recorded=chat, must_agree=True)


def test_a_stage_records_its_rendering_passes_it_on_and_is_resumed_by_no_other(tmp_path):
    tokenizer = tokenizer_of("thinking")
    rows = Dataset.from_list([{"id": "p", "prompt": "x"}])
    silent = PromptRendering(chat_template_kwargs={"enable_thinking": False}).record(tokenizer)

    def job(folder, given, prompts=None):
        return run_job(lambda batch: batch, given, folder, name="job", parameters={}, prompts=prompts)

    assert job(tmp_path / "a", rows, silent)[RECORD] == silent
    assert job(tmp_path / "b", load_stage(tmp_path / "a"))[RECORD] == silent
    with pytest.raises(JobError, match=r"other parameters \(prompts was"):
        job(tmp_path / "a", rows, PromptRendering().record(tokenizer))
    manifest = read_manifest(tmp_path / "a")
    del manifest[RECORD]  # a stage of an earlier version
    write_manifest(tmp_path / "a", manifest)
    assert job(tmp_path / "a", rows, silent)["status"] == "complete"


def test_a_training_is_followed_by_evaluation_and_sampling(tmp_path):
    """As GRPO with `enable_thinking` false: the evaluation of its model asks without thinking unless told otherwise."""
    tokenizer = tokenizer_of("thinking")
    rows = Dataset.from_list([{"prompt": ASKED}])
    off = {"enable_thinking": False}
    made = training_prompts(rows, tokenizer, json.dumps(off), of="rows", folder=tmp_path, resumed=False)
    assert made == PromptRendering("chat", off)
    write_manifest(tmp_path, {"name": "DPOTrainer", "kept": 1})
    note_prompts(tmp_path, made, tokenizer)
    assert read_manifest(tmp_path)["kept"] == 1
    for arguments in (EvaluateArguments(problems="", output_dir=""), SamplingArguments()):
        assert rendering_of(arguments, tokenizer, recorded=recorded_beside(None, tmp_path)) == made
    note_prompts(tmp_path, None, tokenizer)
    assert recorded_beside(None, tmp_path) is None
    texts = Dataset.from_list([{"prompt": "x", "chosen": "y", "rejected": "z"}])
    assert training_prompts(texts, tokenizer, None, of="rows", folder=tmp_path / "t", resumed=False).format == "raw"
    ids = Dataset.from_list([{"prompt": "x", "prompt_ids": [1]}])
    assert training_prompts(ids, tokenizer, None, of="rows", folder=tmp_path / "i", resumed=False) is None
    ids.info.description = json.dumps({RECORD: made.record(tokenizer)})
    assert training_prompts(ids, tokenizer, None, of="rows", folder=tmp_path / "i", resumed=False) == made
    with pytest.raises(ContractError, match="otherwise than those of rows"):
        training_prompts(ids, tokenizer, {"enable_thinking": True}, of="rows", folder=tmp_path / "i", resumed=False)


def test_ids_of_another_template_train_where_they_are_allowed_and_are_noted_as_they_are(tmp_path):
    ids = Dataset.from_list([{"prompt": "x", "prompt_ids": [1]}])
    record = PromptRendering().record(tokenizer_of("thinking"))
    ids.info.description = json.dumps({RECORD: record})
    here = {"of": "rows", "folder": tmp_path, "resumed": False}
    with pytest.raises(ContractError, match="or set `allow_other_tokenizer` if another template is meant"):
        training_prompts(ids, tokenizer_of("system"), None, **here)
    made = training_prompts(ids, tokenizer_of("system"), None, **here, any_template=True)
    assert made.record(tokenizer_of("system")) == record
    with pytest.raises(ContractError, match="rendered otherwise"):  # no tokenizer changes what the ids were made with
        training_prompts(ids, tokenizer_of("system"), {"a": 1}, **here, any_template=True)


def test_a_resumed_training_keeps_its_date(tmp_path):
    rows = Dataset.from_list([{"prompt": ASKED}])
    write_manifest(tmp_path, {RECORD: PromptRendering(date=DATE).record(tokenizer_of("dated"))})
    for resumed in (True, False):
        tokenizer = tokenizer_of("dated")
        training_prompts(rows, tokenizer, None, of="rows", folder=tmp_path, resumed=resumed)
        read = tokenizer.apply_chat_template(ASKED, tokenize=False)
        assert ("03 Feb 2026 04:05:06" in read) == resumed
