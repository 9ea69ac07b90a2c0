"""Labelling from problems to splits of labels, against a plain loop that goes token by token."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import save_tiny, tiny_model, tiny_tokenizer
from tokalign.cli import label as label_command
from tokalign.generation import EngineArguments
from tokalign.generation.protocol import Completion
from tokalign.prompts import PromptRendering, render_prompt, rendering_of
from tokalign.routing.decode.arguments import RoutedSamplingArguments
from tokalign.routing.decode.generator import RoutedGenerator
from tokalign.routing.decode.policies import EntropyPolicy, NeverLLM, NextTokens, prompts_of_labels
from tokalign.routing.labels import judge as judging
from tokalign.routing.labels import labeller, labelling, verdicts
from tokalign.routing.labels.arguments import STAGES, LabelArguments, VerdictArguments
from tokalign.routing.labels.features import INPUTS, TENSORS, open_features, row_features
from tokalign.routing.labels.judge import Comparison, branch_text, judge_messages, load_judge_template, parse_verdict
from tokalign.routing.labels.sentences import sentence_rule
from tokalign.routing.router.features import RouterDataset
from tokalign.routing.router.trainer import new_router
from tokalign.stage.errors import ContractError, JobError
from tokalign.stage.hashes import tokenizer_hash
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import manifest_of, read_manifest

ROOT = Path(__file__).resolve().parents[2]
END, MAX_TOKENS, STOP = 1, 40, ["e", "7"]
SHARED = len(tiny_tokenizer())
COUNT = 16


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict[str, str]:
    """SLM and LLM of one tokenizer, the LLM's vocabulary padded by 7 ids; problems; one answers stage."""
    root = tmp_path_factory.mktemp("pair")
    tokenizer = tiny_tokenizer()
    large = tiny_model(SHARED + 7, seed=5, layers=1)
    with torch.no_grad():
        large.lm_head.weight[SHARED:] = 0  # as in a real model, where padding is never the greedy choice
    large.save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    small = tiny_model(SHARED, seed=5, layers=1)
    with torch.no_grad():  # near the LLM, so that some choices agree and some do not
        small.model.load_state_dict({k: v[:SHARED] if "embed" in k else v for k, v in large.model.state_dict().items()})
        small.lm_head.weight.copy_(large.lm_head.weight[:SHARED])
        for parameter in small.parameters():
            parameter.add_(0.06 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    small.save_pretrained(root / "slm")
    tokenizer.save_pretrained(root / "slm")
    rows = [{"id": f"p{k}", "prompt": f"{k} and {k * k}?", "answer": str(k % 2)} for k in range(COUNT)]
    (root / "problems").mkdir()
    Dataset.from_list(rows).to_parquet(root / "problems" / "train.parquet")
    return {"slm": str(root / "slm"), "llm": str(root / "llm"), "problems": str(root / "problems"), "root": str(root)}


@pytest.fixture(autouse=True)
def answers_of_random_models(monkeypatch):
    """Random models write no answers, so one is read into their texts: how many letters a text has, modulo 2."""

    def extract(text):
        return str(sum(map(str.isalpha, text)) % 2)

    monkeypatch.setattr(labelling, "extract_answer", extract)
    monkeypatch.setattr(labeller, "extract_answer", extract)
    return extract


def arguments(pair, folder, **changes) -> tuple[LabelArguments, VerdictArguments]:
    values = {"slm": pair["slm"], "dataset": pair["problems"], "output_dir": str(folder), "max_tokens": MAX_TOKENS}
    values |= {"stop": STOP, "shard_size": 3, "top_k": 9, "calibration_share": 0.25, "test_share": 0.25}
    if "on_policy" in changes:
        values["dataset"] = None
    values |= changes
    own = {field.name for field in dataclasses.fields(VerdictArguments)} & set(values)
    verdict = VerdictArguments(**{name: values.pop(name) for name in own})
    return LabelArguments(**values), verdict


def label(pair, folder, **changes) -> None:
    label_command.main(*arguments(pair, folder, **changes), EngineArguments(model=pair["llm"]))


class Plain:
    """The pipeline of methods.md without batches, caches or jobs."""

    def __init__(self, pair, extract):
        self.slm, self.llm = (AutoModelForCausalLM.from_pretrained(pair[name]) for name in ("slm", "llm"))
        self.tokenizer, self.extract = AutoTokenizer.from_pretrained(pair["llm"]), extract

    @torch.no_grad()
    def choice(self, model, ids) -> int:
        return int(model(torch.tensor([ids])).logits[0, -1, :SHARED].argmax())

    def go_on(self, prompt, written, ended, most) -> tuple[list[int], bool]:
        new: list[int] = []
        while not ended(new):
            if len(new) == most:
                return new, False
            new.append(self.choice(self.llm, [*prompt, *written, *new]))
        return new, True

    def stops(self, ids) -> bool:
        return bool(ids) and (ids[-1] == END or any(s in self.tokenizer.decode(ids[-1:]) for s in STOP))

    def answer(self, prompt) -> tuple[list[int], bool]:
        return self.go_on(prompt, [], self.stops, MAX_TOKENS)

    def right(self, ids, answer) -> bool:
        return self.extract(self.tokenizer.decode(ids, skip_special_tokens=True)) == answer

    def to_the_end(self, prompt, before, token) -> tuple[list[int], bool]:
        if token == END:
            return [END], True
        new, ended = self.go_on(prompt, [*before, token], self.stops, MAX_TOKENS)
        return [token, *new], ended


def all_labels(folder) -> dict[str, dict]:
    rows = [row for split in sorted((Path(folder) / "labels").iterdir()) for row in load_stage(split).to_list()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def test_labels_equal_a_plain_loop(pair, tmp_path, answers_of_random_models, capsys):
    label(pair, tmp_path)
    plain = Plain(pair, answers_of_random_models)
    found = all_labels(tmp_path)
    branches = {(row["id"], row["position"]): row["slm_branch_ids"] for row in load_stage(tmp_path / "branches")}
    seen, unfinished, cut_off = Counter(), 0, 0
    for problem in load_stage(pair["problems"]):
        prompt = render_prompt(problem["prompt"], plain.tokenizer)
        answer, ended = plain.answer(prompt)
        if not ended:
            unfinished += 1
            assert problem["id"] not in found
            continue
        row = found.pop(problem["id"])
        assert row["prompt_ids"] == prompt and row["completion_ids"] == answer
        right = plain.right(answer, problem["answer"])
        assert row["correct"] is right
        for t, token in enumerate(answer):
            choice = plain.choice(plain.slm, [*prompt, *answer[:t]])
            assert row["slm_ids"][t] == choice
            expected = 0
            if choice != token:
                expected = -1
                if right:
                    branch, ended = plain.to_the_end(prompt, answer[:t], choice)
                    assert branches.pop((row["id"], t)) == branch
                    expected = 1 if plain.right([*answer[:t], *branch], problem["answer"]) else 2 if ended else -1
                    cut_off += expected == -1
            assert row["label"][t] == expected
            seen[expected] += 1
    assert not found and not branches and set(seen) == {-1, 0, 1, 2} and unfinished

    manifest = read_manifest(tmp_path / "answers")
    assert manifest["dropped"] == {labelling.UNFINISHED: unfinished}
    report = json.loads((tmp_path / "report.json").read_text())
    splits = report["splits"]
    assert sum(split["tokens"] for split in splits.values()) == sum(seen.values()) == report["features"]["tokens"]
    for name, value in {"identical": 0, "neutral": 1, "divergent": 2, "invalid": -1}.items():
        assert sum(split["counts"][name] for split in splits.values()) == seen[value]
    assert cut_off  # where a branch that was cut off would have led is not known
    assert report["invalid"] == {verdicts.CUT_OFF: cut_off, verdicts.LLM_WRONG: seen[-1] - cut_off}
    by_position = [split["by_position"] for split in splits.values()]
    assert sum(sum(part["divergent"]) for part in by_position) == seen[2]
    assert sum(sum(part["differ"]) for part in by_position) == seen[1] + seen[2] + seen[-1]
    assert report["stages"]["branches"]["tokens"] == sum(
        len(row["slm_branch_ids"]) - 1 for row in load_stage(tmp_path / "branches")
    )
    assert report["features"]["formula_per_million_tokens"] == (2 * 32 + 2 * 9 + 8) * 10**6
    assert report["features"]["bytes_per_million_tokens"] > report["features"]["formula_per_million_tokens"]  # headers
    assert (tmp_path / "report.png").stat().st_size > 1000 and "divergent" in capsys.readouterr().out


@torch.no_grad()
def test_features_are_the_slms_at_each_position(pair, tmp_path):
    label(pair, tmp_path)
    slm = AutoModelForCausalLM.from_pretrained(pair["slm"])
    for split in (tmp_path / "labels").iterdir():
        manifest = read_manifest(split)
        assert manifest["shared_vocab"] == SHARED and manifest["top_k"] == 9 and manifest["hidden_size"] == 32
        assert (
            manifest["tokenizer_hash"]
            == manifest["models"]["slm"]["tokenizer_hash"]
            == tokenizer_hash(tiny_tokenizer())
        )
        for row in load_stage(split, stage="routing_labels"):
            arrays = open_features((split / manifest["features"]).resolve() / row["features_file"])
            part = slice(row["features_first"], row["features_first"] + len(row["label"]))
            ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]])
            at = slice(len(row["prompt_ids"]) - 1, ids.shape[1] - 1)
            hidden, logits = slm.model(ids).last_hidden_state[0, at], slm(ids).logits[0, at]
            # what a router is given while it routes
            served = row_features(hidden, logits, top_k=9, shared_vocab=SHARED, needs=INPUTS)
            for name, values in served.items():
                rounding = 2e-3 if TENSORS[name] is np.float16 else 1e-5
                stored = torch.tensor(arrays[name][part]).to(values.dtype)
                torch.testing.assert_close(stored, values, rtol=rounding, atol=rounding)
            scored = EntropyPolicy(0.5).scores(NextTokens(None, logits, ids, ids, ids))
            assert scored.tolist() == served["entropy"].tolist()
            assert arrays["predicted"][part].tolist() == row["slm_ids"]
            assert logits.argmax(-1).tolist() == row["slm_ids"]


def test_shards_and_stages_one_at_a_time_change_nothing(pair, tmp_path):
    label(pair, tmp_path / "whole")
    for stage in STAGES:
        label(pair, tmp_path / "parts", stages=[stage], shard_size=5)
    drop = ("features_file", "features_first")
    one, two = (all_labels(tmp_path / name) for name in ("whole", "parts"))
    assert [{k: v for k, v in row.items() if k not in drop} for row in one.values()] == [
        {k: v for k, v in row.items() if k not in drop} for row in two.values()
    ]


def test_a_finished_stage_loads_no_model_and_another_run_is_refused(pair, tmp_path, monkeypatch):
    label(pair, tmp_path)
    before = all_labels(tmp_path)
    monkeypatch.setattr(labelling, "load_engine", None)
    monkeypatch.setattr(labelling, "DivergenceScorer", None)
    label(pair, tmp_path)
    assert all_labels(tmp_path) == before
    with pytest.raises(JobError, match="max_tokens was 40 and is 41"):
        label(pair, tmp_path, max_tokens=41)
    with pytest.raises(JobError, match="top_k was 9 and is 8"):
        label(pair, tmp_path, top_k=8)
    other = save_tiny(tmp_path / "other", seed=9)
    with pytest.raises(JobError, match="slm was"):
        label({**pair, "slm": other}, tmp_path, stages=["prefill"])
    with pytest.raises(ContractError, match="was grown for the verdict 'outcome', not 'judge'"):
        label(pair, tmp_path, stages=["labels"], **JUDGE)


def test_labels_of_other_branches_are_refused(pair, tmp_path):
    label(pair, tmp_path)
    shutil.rmtree(tmp_path / "branches")
    with pytest.raises(JobError, match="branches was"):
        label(pair, tmp_path, max_branches_per_answer=1)


def test_a_killed_prefill_shard_is_done_again_with_its_features(pair, tmp_path):
    label(pair, tmp_path, stages=["answers", "prefill"])
    folder = tmp_path / "prefill"
    rows = load_stage(folder).to_list()
    features = {file.name: file.read_bytes() for file in (folder / "features").iterdir()}
    assert {row["features_file"] for row in rows} == set(features) and len(features) > 2
    # killed between the features of the last shard and its rows; those of the first cut short by then
    part = sorted(folder.glob("part-*.parquet"))
    part[-1].unlink()
    part[0].unlink()
    first = folder / "features" / rows[0]["features_file"]
    first.write_bytes(features[first.name][:100])
    label(pair, tmp_path, stages=["prefill"])
    assert load_stage(folder).to_list() == rows
    assert {file.name: file.read_bytes() for file in (folder / "features").iterdir()} == features


@pytest.mark.slow
def test_two_processes_prefill_as_one(pair, tmp_path):
    label(pair, tmp_path / "one", stages=["answers"])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    label(pair, tmp_path / "one", stages=["prefill"])
    flags = {"slm": pair["slm"], "model": pair["llm"], "dataset": pair["problems"], "output_dir": tmp_path / "two"}
    flags |= {"stages": "prefill", "max_tokens": MAX_TOKENS, "shard_size": 3, "top_k": 9}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "scripts" / "label_routing.py")]
    command += [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_stage(tmp_path / name / "prefill") for name in ("one", "two"))
    exact = ["id", "slm_ids", "features_file", "features_first"]
    assert one.select_columns(exact).to_list() == two.select_columns(exact).to_list()
    for name in one.unique("features_file"):
        left, right = (open_features(tmp_path / n / "prefill" / "features" / name) for n in ("one", "two"))
        for key in left:
            torch.testing.assert_close(torch.tensor(left[key]), torch.tensor(right[key]), rtol=2e-3, atol=2e-3)


# --- the judge --------------------------------------------------------------------------------------------------------

JUDGE = {"verdict": "judge", "judge": "some-judge", "judge_engine": "transformers", "judge_max_tokens": 30}


def opinion(text: str) -> str:
    """A judge that nobody understands, but the same for the same text."""
    replies = ("VERDICT: SAME", "VERDICT: DIFFERENT", "VERDICT: DIFFERENT", "no idea")
    return replies[hashlib.sha256(text.encode()).digest()[0] % 4]


class Judge:
    def __init__(self):
        self.tokenizer, self.max_length, self.closed = tiny_tokenizer(), None, False

    def generate(self, prompts, params, *, adapter=None):
        texts = [opinion(self.tokenizer.decode(ids)) for ids in prompts]
        return [[Completion([*self.tokenizer(text).input_ids, END], [], "stop")] for text in texts]

    def close(self):
        self.closed = True


@pytest.mark.parametrize("swap", [False, True])
def test_judge_labels_equal_a_plain_loop(pair, tmp_path, monkeypatch, answers_of_random_models, swap):
    judge = Judge()
    monkeypatch.setattr(judging, "load_engine", lambda a: {"some-judge": judge}[a.model])
    label(pair, tmp_path, **JUDGE, swap_order=swap, branch_max_tokens=20, judge_context=4)
    assert judge.closed
    plain = Plain(pair, answers_of_random_models)
    rule, template = sentence_rule(plain.tokenizer, SHARED), load_judge_template("general")
    questions = {row["id"]: row["prompt"] for row in load_stage(pair["problems"])}
    seen, reasons = Counter(), Counter()
    for row in all_labels(tmp_path).values():
        prompt, answer = row["prompt_ids"], row["completion_ids"]
        for t, (token, choice) in enumerate(zip(answer, row["slm_ids"], strict=True)):
            expected = 0
            if token != choice:
                begun = rule.open_before(answer[:t])[-1]

                def ended(new, first=choice, begun=begun):
                    return [first, *new][-1] == END or rule.cut([first, *new], begun) is not None

                new, _ = plain.go_on(prompt, [*answer[:t], choice], ended, 20)
                own = answer[t : t + 21]
                own = own[: rule.cut(own, begun)]
                texts = [branch_text(ids, plain.tokenizer) for ids in (answer[max(0, t - 4) : t], own, [choice, *new])]
                said = []
                for swapped in (False, True) if swap else (False,):
                    messages = judge_messages(template, Comparison(questions[row["id"]], *texts), swapped=swapped)
                    rendered = judge.tokenizer.decode(render_prompt(messages, judge.tokenizer))
                    said.append(parse_verdict(opinion(rendered), template))
                expected = said[0] if said[0] is not None and len(set(said)) == 1 else -1
                if expected == -1:
                    reasons["the judge gave no verdict" if None in said else "the judge's two orders disagree"] += 1
            assert row["label"][t] == expected
            seen[expected] += 1
    assert set(seen) == {-1, 0, 1, 2}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["invalid"] == reasons and len(reasons) == (2 if swap else 1)
    if swap:
        told = seen[1] + seen[2]
        disagree = reasons["the judge's two orders disagree"]
        assert report["judge"] == {
            "agree": told,
            "disagree": disagree,
            "disagreement": disagree / (told + disagree),
            "no_verdict": reasons["the judge gave no verdict"],
        }


def test_most_branches_an_answer(pair, tmp_path):
    label(pair, tmp_path, max_branches_per_answer=1)
    counts = Counter(row["id"] for row in load_stage(tmp_path / "branches"))
    assert set(counts.values()) == {1}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["invalid"]["left out by max_branches_per_answer"] > 0
    told = sum(split["counts"][name] for split in report["splits"].values() for name in ("neutral", "divergent"))
    assert told == len(counts)


# --- on policy --------------------------------------------------------------------------------------------------------


def test_on_policy_labels_equal_a_plain_loop(pair, tmp_path, answers_of_random_models):
    plain = Plain(pair, answers_of_random_models)
    problems = load_stage(pair["problems"]).select(range(4)).to_list()

    def route(rows):
        """Completions of two samples a problem in which the models take turns."""
        for row in rows:
            prompt, made = render_prompt(row["prompt"], plain.tokenizer), []
            for sample in range(2):
                ids, by = [], []
                while len(ids) < 12 and not plain.stops(ids):
                    by.append((len(ids) + sample) % 3 == 0)
                    ids.append(plain.choice(plain.llm if by[-1] else plain.slm, [*prompt, *ids]))
                written = {"written_by": list(map(int, by)), "scores": [0.5] * len(ids), "sample": sample}
                made.append({**row, "prompt_ids": prompt, "completion_ids": ids, **written})
            yield made

    run_job(route, Dataset.from_list(problems), tmp_path / "routed", name="r", parameters={}, tokenizer=plain.tokenizer)
    label(pair, tmp_path / "labels", on_policy=str(tmp_path / "routed"), calibration_share=0.0, test_share=0.0)
    rows = load_stage(tmp_path / "labels" / "labels" / "train", stage="routing_labels").to_list()
    assert [(row["id"], row["sample"]) for row in rows] == [(f"p{k}", s) for k in range(4) for s in range(2)]
    seen = Counter()
    for row, routed in zip(rows, load_stage(tmp_path / "routed"), strict=True):
        prompt, written = row["prompt_ids"], row["completion_ids"]
        assert written == routed["completion_ids"] and row["written_by"] == routed["written_by"]
        for t in range(len(written)):
            before = written[:t]
            llm, slm = (plain.choice(model, [*prompt, *before]) for model in (plain.llm, plain.slm))
            assert (row["llm_ids"][t], row["slm_ids"][t]) == (llm, slm)
            expected = 0
            if llm != slm:
                (llm_ids, _), (slm_ids, ended) = (plain.to_the_end(prompt, before, token) for token in (llm, slm))
                llm_right, slm_right = (plain.right([*before, *ids], routed["answer"]) for ids in (llm_ids, slm_ids))
                expected = (1 if slm_right else 2 if ended else -1) if llm_right else -1
            assert row["label"][t] == expected
            seen[expected] += 1
    assert set(seen) == {-1, 0, 1, 2}
    assert not any(file.name != "train" for file in (tmp_path / "labels" / "labels").iterdir())

    bare = load_stage(tmp_path / "routed").remove_columns("written_by")
    run_job(lambda b: b, bare, tmp_path / "bare", name="r", parameters={}, tokenizer=plain.tokenizer)
    with pytest.raises(ContractError, match="has no column `written_by`; make it with `tokalign generate`"):
        label(pair, tmp_path / "x", on_policy=str(tmp_path / "bare"))


# --- one rule for the prompts of labels and of decoding --------------------------------------------------------------


def test_labels_are_made_on_the_prompts_that_decoding_will_see(pair, tmp_path):
    """The SLM's chat template, where the two differ, with the variables that are given; the stages record both."""
    small = copy.copy(AutoTokenizer.from_pretrained(pair["slm"]))
    small.chat_template = "{{ how }}" + small.chat_template
    other = {"slm": str(tmp_path / "slm"), "llm": pair["llm"], "problems": pair["problems"]}
    shutil.copytree(pair["slm"], other["slm"])
    small.save_pretrained(other["slm"])
    label(other, tmp_path / "labels", chat_template_kwargs={"how": "7"}, num_problems=6)
    generator = RoutedGenerator.from_pretrained(other["slm"], other["llm"], policy=NeverLLM())
    rendering = PromptRendering(chat_template_kwargs={"how": "7"})
    problems = {row["id"]: row for row in load_stage(pair["problems"])}
    for name in ("answers", "prefill", "labels/train"):
        rows = load_stage(tmp_path / "labels" / name, tokenizer=generator.tokenizer)
        assert manifest_of(rows)["prompts"] == rendering.record(generator.tokenizer)
        for row in rows:
            assert row["prompt_ids"] == rendering.ids(problems[row["id"]], generator.tokenizer)
            assert generator.tokenizer.decode(row["prompt_ids"]).startswith("7<|user|>")
    router = new_router(other["slm"], RouterDataset(tmp_path / "labels" / "labels"), width=4, num_blocks=1)
    router.save_pretrained(tmp_path / "router")
    assert prompts_of_labels(str(tmp_path / "router")) == rendering.record(generator.tokenizer)
    routed = RoutedGenerator.from_pretrained(other["slm"], other["llm"], str(tmp_path / "router"), threshold=0.5)
    sampling = RoutedSamplingArguments(num_rollouts=1)
    assert rendering_of(sampling, routed.tokenizer, recorded=routed.prompts) == rendering


# --- splits and bad input ---------------------------------------------------------------------------------------------


def test_splits_are_by_problem():
    ids = [f"p{k % 500}" for k in range(1000)]
    parts = labelling.split_indices(ids, 0.1, 0.2)
    assert sorted(i for part in parts.values() for i in part) == list(range(1000))
    names = {split: {ids[i] for i in part} for split, part in parts.items()}
    assert not names["train"] & names["test"] and not names["train"] & names["calibration"]
    assert 30 <= len(names["calibration"]) <= 70 and 75 <= len(names["test"]) <= 125
    # a larger share keeps what there was
    more = labelling.split_indices(ids, 0.1, 0.3)
    assert set(parts["test"]) <= set(more["test"])


def test_rows_without_an_answer_are_dropped_by_outcome(pair, tmp_path):
    rows = load_stage(pair["problems"]).to_list()
    for row in rows[:8]:
        row["answer"] = None
    (tmp_path / "problems").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "problems" / "train.parquet")
    label(pair, tmp_path, dataset=str(tmp_path / "problems"))
    answered = len([row for row in load_stage(tmp_path / "answers") if row["answer"]])
    assert 0 < answered < len(load_stage(tmp_path / "answers"))
    assert len(all_labels(tmp_path)) == answered
    assert read_manifest(tmp_path / "branches")["dropped"][verdicts.NO_ANSWER] > 0

    bare = Dataset.from_list([{"id": "p", "prompt": "x"}])
    (tmp_path / "bare").mkdir()
    bare.to_parquet(tmp_path / "bare" / "train.parquet")
    with pytest.raises(ContractError, match="has no column `answer`"):
        label(pair, tmp_path / "x", dataset=str(tmp_path / "bare"))


def test_models_that_agree_everywhere_have_no_branches(pair, tmp_path):
    label({**pair, "slm": pair["llm"]}, tmp_path)
    assert read_manifest(tmp_path / "branches")["rows"] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(split["shares"]["identical"] == 1 for split in report["splits"].values())


def test_another_tokenizer_is_refused(pair, tmp_path):
    other = tiny_tokenizer("abc")
    shutil.copytree(pair["slm"], tmp_path / "slm")
    other.save_pretrained(tmp_path / "slm")
    with pytest.raises(ValueError, match=r"The SLM's tokenizer .* is not the LLM's"):
        label({**pair, "slm": str(tmp_path / "slm")}, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ["answer"]}, "There is no stage 'answer': --stages takes answers, prefill, branches, labels"),
        ({"dataset": None}, "Give either --dataset"),
        ({"calibration_share": 0.6, "test_share": 0.4}, "leave nothing to train on"),
        ({"verdict": "judge"}, "--verdict judge needs --judge"),
        ({"verdict": "judge", "judge": "j"}, "A judge on a server needs --judge_base_urls"),
    ],
)
def test_arguments_that_are_refused(pair, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(pair, tmp_path, **changes)
