"""An option that is accepted is read: every one that the trainings inherit, and every one of our own verbs."""

from __future__ import annotations

import ast
import json
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_dataset
from trl.scripts.utils import DatasetConfig

import tokalign
from tests.support import ALPHABET, tiny_tokenizer
from tokalign.cli import train as shared
from tokalign.cli.main import GROUPS, main_of, parser_of
from tokalign.cli.pairs import PairsArguments
from tokalign.cli.reward import RewardArguments
from tokalign.cli.train import DataArguments
from tokalign.stage.errors import ContractError, OptionError
from tokalign.stage.hashes import tokenizer_hash
from tokalign.stage.jobs import run_job
from tokalign.stage.manifest import manifest_of

ROOT = Path(tokalign.__file__).parent
VERBS = [verb for group in GROUPS.values() for one in group for verb in (one.parts or (one,))]


def arguments_of(verb) -> list[type]:
    return [parameter.annotation for parameter in signature(main_of(verb.module), eval_str=True).parameters.values()]


TRAININGS = {verb.name: verb for verb in VERBS if any(issubclass(kind, DataArguments) for kind in arguments_of(verb))}


class Recorder:
    """A trainer that trains nothing and keeps what it was given."""

    def __init__(self, **given: Any):
        self.given, self.args, self.train_dataset = given, given["args"], given["train_dataset"]
        self.model, self.processing_class = torch.nn.Linear(1, 1), None
        self.model.register_buffer("mask", torch.ones(1, dtype=torch.bool))
        self.model.register_buffer("scale", torch.ones(1))
        self.accelerator = SimpleNamespace(end_training=lambda: None)

    def train(self, **_: Any) -> None: ...

    def save_model(self, folder: str) -> None: ...

    def is_world_process_zero(self) -> bool:
        return False


def ids_of(rows: Any) -> Any:
    return None if rows is None else [type(rows).__name__, sorted(next(iter(rows))), [row["id"] for row in rows]]


def seen(trainer: Recorder) -> dict[str, Any]:
    """All that a trainer can see of the options."""
    peft, quantised = trainer.given["peft_config"], trainer.given["quantization_config"]
    return {
        "train": ids_of(trainer.given["train_dataset"]),
        "evaluation": ids_of(trainer.given["eval_dataset"]),
        "model": str(trainer.given["model"]),
        "loading": trainer.args.model_init_kwargs,
        "peft": None if peft is None else peft.to_dict(),
        "quantisation": None if quantised is None else quantised.to_dict(),
        "ignored by DDP": getattr(trainer.model, "_ddp_params_and_buffers_to_ignore", None),
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tiny_path) -> dict[str, str]:
    """Two datasets on disk; the first has two configurations, each with the splits train and test."""
    root = tmp_path_factory.mktemp("sources")
    configs = []
    for config in ("first", "second"):
        for split, count in (("train", 4), ("test", 2)):
            ids = [f"{config}-{split}-{i}" for i in range(count)]
            (root / "one" / config).mkdir(parents=True, exist_ok=True)
            Dataset.from_dict({"id": ids, "prompt": ids}).to_parquet(root / "one" / config / f"{split}.parquet")
        files = [{"split": split, "path": f"{config}/{split}.parquet"} for split in ("train", "test")]
        configs.append({"config_name": config, "data_files": files, **({"default": True} if config == "first" else {})})
    (root / "one" / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    for split in ("train", "test"):
        (root / "two").mkdir(exist_ok=True)
        Dataset.from_dict({"id": [f"two-{split}"], "prompt": ["x"]}).to_parquet(root / "two" / f"{split}.parquet")
    return {"one": str(root / "one"), "two": str(root / "two"), "model": tiny_path}


def run(name: str, monkeypatch, tmp_path, sources: dict[str, str], options: dict[str, Any]) -> dict[str, Any]:
    """What the trainer of a verb sees under these options, by its main."""
    verb = TRAININGS[name]
    main = main_of(verb.module)
    for module in {import_module(verb.module), import_module(main.__module__)}:
        for key, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, Trainer):
                monkeypatch.setattr(module, key, Recorder)
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    needed = {"model_name_or_path": sources["model"], "dataset_name": sources["one"]}
    given = {key: value for key, value in {**needed, **common, **options}.items() if value is not None}
    kinds = arguments_of(verb)
    made = [kind(**{f.name: given[f.name] for f in fields(kind) if f.init and f.name in given}) for kind in kinds]
    assert not set(given) - {f.name for kind in kinds for f in fields(kind)}
    return seen(main(*made))


EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}
LORA, FOUR_BITS = {"use_peft": True}, {"load_in_4bit": True}
MIXED = {"dataset_name": None}


def mixture(source: str, **more: Any) -> dict[str, Any]:
    return {**MIXED, "datasets": [{"path": source, **more}]}


# For each inherited option a value that must show, what it needs beside it, and where it shows.
SHOWS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "dataset_name": ("TWO", {}, "train"),
    "dataset_config": ("second", {}, "train"),
    "dataset_train_split": ("train[:1]", {}, "train"),
    "dataset_test_split": ("train", EVALUATES, "evaluation"),
    "dataset_streaming": (True, {}, "train"),
    "ignore_bias_buffers": (True, {}, "ignored by DDP"),
    "datasets": ([{"path": "TWO"}], {}, "train"),
    "streaming": (True, {"datasets": [{"path": "ONE"}]}, "train"),
    "test_split_size": (1, {"datasets": [{"path": "ONE"}]}, "train"),
    "model_name_or_path": ("COPY", {}, "model"),
    "model_revision": ("another", {}, "loading"),
    "dtype": ("bfloat16", {}, "loading"),
    "attn_implementation": ("eager", {}, "loading"),
    "use_peft": (True, {}, "peft"),
    "lora_r": (3, LORA, "peft"),
    "lora_alpha": (7, LORA, "peft"),
    "lora_dropout": (0.5, LORA, "peft"),
    "lora_target_modules": (["q_proj", "k_proj"], LORA, "peft"),
    "lora_target_parameters": (["experts.w"], LORA, "peft"),
    "lora_modules_to_save": (["lm_head"], LORA, "peft"),
    "lora_task_type": ("SEQ_CLS", LORA, "peft"),
    "use_rslora": (True, LORA, "peft"),
    "use_dora": (True, LORA, "peft"),
    "load_in_8bit": (True, {}, "quantisation"),
    "load_in_4bit": (True, {}, "quantisation"),
    "bnb_4bit_quant_type": ("fp4", FOUR_BITS, "quantisation"),
    "use_bnb_nested_quant": (True, FOUR_BITS, "quantisation"),
    "bnb_4bit_quant_storage": ("float16", FOUR_BITS, "quantisation"),
}
# The same of a data set in a mixture.
PART: dict[str, Any] = {
    "path": "TWO",
    "name": "second",
    "data_dir": "second",
    "data_files": "second/test.parquet",
    "split": "test",
    "columns": ["id"],
    "fraction": 0.5,
}


def test_every_inherited_option_has_its_value_here():
    """An option that a new TRL brings fails here until it is known how it shows."""
    inherited = {f.name for kind in (ScriptArguments, DatasetMixtureConfig, ModelConfig) for f in fields(kind)}
    assert inherited <= set(SHOWS) and {f.name for f in fields(DatasetConfig)} <= set(PART)
    assert set(TRAININGS) >= {"sft", "dpo", "critical-dpo", "treg", "structured-grpo"}


BEFORE: dict[tuple[str, str], dict[str, Any]] = {}  # what a training sees without the option, computed once


def filled(value: Any, sources: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [filled(one, sources) for one in value]
    if isinstance(value, dict):
        return {key: filled(one, sources) for key, one in value.items()}
    return {"ONE": sources["one"], "TWO": sources["two"], "COPY": sources["model"] + "/."}.get(value, value)


@pytest.mark.parametrize(
    "option", [f.name for kind in (DataArguments, ModelConfig) for f in fields(kind) if f.name in SHOWS]
)
@pytest.mark.parametrize("name", TRAININGS)
def test_an_inherited_option_shows(monkeypatch, tmp_path, sources, name, option):
    value, beside, where = SHOWS[option]
    key = (name, repr(beside))
    if key not in BEFORE:
        BEFORE[key] = run(name, monkeypatch, tmp_path, sources, filled(beside, sources))
    before = BEFORE[key]
    after = run(name, monkeypatch, tmp_path, sources, filled({**beside, option: value}, sources))
    assert {key for key in after if after[key] != before[key]} == {where}
    if where == "loading":
        assert filled(value, sources) in after[where].values()


@pytest.mark.parametrize("option", [f.name for f in fields(DatasetConfig)])
def test_an_option_of_a_part_of_a_mixture_shows(monkeypatch, tmp_path, sources, option):
    before, after = [{"path": sources["one"]}], [{"path": sources["one"], option: filled(PART[option], sources)}]
    if option == "fraction":  # of all parts or of none
        before, after = [*before, {"path": sources["two"]}], [*after, {"path": sources["two"], "fraction": 0.5}]
    trains = [run("sft", monkeypatch, tmp_path, sources, {**MIXED, "datasets": parts}) for parts in (before, after)]
    assert trains[0]["train"] != trains[1]["train"]


# ---------------------------------------------------------------------------------------------------- data and mixtures


def test_both_the_mixture_and_the_name(monkeypatch, tmp_path, sources, caplog):
    """As in TRL's scripts the mixture is read, and a warning says so."""
    seen = run("dpo", monkeypatch, tmp_path, sources, {"datasets": [{"path": sources["two"]}]})
    assert seen["train"][2] == ["two-train"]
    assert "`datasets` and `dataset_name` are both given" in caplog.text


def test_every_process_splits_a_mixture_alike(monkeypatch, tmp_path, sources):
    """TRL draws the test rows by NumPy's global state, which processes do not share (shown first, in TRL alone)."""
    parts = [{"path": sources["one"]}]

    def alone(state: int) -> list[str]:
        np.random.seed(state)
        return get_dataset(DatasetMixtureConfig(datasets=list(parts), test_split_size=2))["test"]["id"][:]

    assert len({tuple(alone(state)) for state in range(8)}) > 1
    options = {**MIXED, **EVALUATES, "datasets": parts, "test_split_size": 2}
    splits = []
    for state in range(4):
        np.random.seed(state)
        splits.append(run("dpo", monkeypatch, tmp_path, sources, {**options, "datasets": list(parts)}))
    assert all(split == splits[0] for split in splits)
    assert not set(splits[0]["train"][2]) & set(splits[0]["evaluation"][2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": None}, "--dataset_name is required: "),
        ({"model_name_or_path": None}, "--model_name_or_path is required"),
        ({"streaming": True}, "are of the mixture"),
        ({"test_split_size": 0.5}, "are of the mixture"),
        ({"datasets": [{"path": "TWO"}], "streaming": True, "test_split_size": 0.5}, "cannot split a stream"),
        ({"datasets": [{"path": "TWO"}], **EVALUATES}, r"no split 'test' \(it has train\); set --test_split_size"),
        ({"eval_dataset_name": "TWO"}, "--eval_dataset_name is read with --eval_strategy"),
        ({"dataset_train_split": "train_prefs"}, r"no split 'train_prefs' \(it has train, test\)"),
        ({"dataset_streaming": True, "dataset_train_split": "train[:1]"}, "one whole split"),
        ({"dataset_config": "third"}, "'first', 'second'"),
    ],
)
@pytest.mark.parametrize("name", TRAININGS)
def test_what_cannot_be_read_is_said(monkeypatch, tmp_path, sources, name, options, message):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)  # before anything is loaded
    if name == "sft" and "required" not in message and "mixture" not in message:
        monkeypatch.undo()  # its tokenizer must have made the ids of a stage
    with pytest.raises((ContractError, OptionError, ValueError), match=message):
        run(name, monkeypatch, tmp_path, sources, filled(options, sources))


def test_a_mixture_of_stages_is_of_one_tokenizer(monkeypatch, tmp_path, sources):
    """Stages in a mixture are whole, and what trains is told whose ids they are."""
    own = tiny_tokenizer()
    for name, tokenizer in (("a", own), ("b", own), ("other", tiny_tokenizer(ALPHABET[::-1]))):
        rows = Dataset.from_dict({"id": [name]})
        run_job(lambda batch: batch, rows, tmp_path / name, name=name, parameters={}, tokenizer=tokenizer)
    arguments = DataArguments(datasets=[DatasetConfig(str(tmp_path / name)) for name in ("a", "b")])
    mixture = shared._mixture(arguments, 0, None)
    assert mixture["train"]["id"][:] == ["a", "b"]
    assert manifest_of(mixture["train"]) == {"tokenizer_hash": tokenizer_hash(own)}
    arguments.datasets.append(DatasetConfig(str(tmp_path / "other")))
    with pytest.raises(ContractError, match="different tokenizers"):
        shared._mixture(arguments, 0, None)
    (tmp_path / "b" / "part-00000-of-00001.parquet").unlink()
    with pytest.raises(ContractError, match="lacks shard"):
        shared._mixture(DataArguments(datasets=[DatasetConfig(str(tmp_path / "b"))]), 0, None)


def test_a_file_to_evaluate_on_is_its_own_split(monkeypatch, tmp_path, sources):
    for name in ("train", "held_out"):
        Dataset.from_dict({"id": [name]}).to_json(tmp_path / f"{name}.jsonl")
    options = {**EVALUATES, "dataset_name": str(tmp_path / "train.jsonl")}
    held_out = {"eval_dataset_name": str(tmp_path / "held_out.jsonl")}
    assert run("dpo", monkeypatch, tmp_path, sources, {**options, **held_out})["evaluation"][2] == ["held_out"]
    with pytest.raises(OptionError, match="--eval_dataset_name"):  # never the rows that are trained on
        run("dpo", monkeypatch, tmp_path, sources, options)
    with pytest.raises(ContractError, match="has no rows"):
        (tmp_path / "empty.jsonl").write_text("")
        run("dpo", monkeypatch, tmp_path, sources, {"dataset_name": str(tmp_path / "empty.jsonl")})


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("file", ["none.jsonl", "none.parquet"])
def test_no_rows_is_said(monkeypatch, tmp_path, sources, streamed, file):
    (tmp_path / "rows").mkdir()
    empty = Dataset.from_dict({"id": ["a"]}).select([])
    _ = (
        empty.to_parquet(tmp_path / "rows" / file)
        if file.endswith("parquet")
        else empty.to_json(tmp_path / "rows" / file)
    )
    options = {"dataset_name": str(tmp_path / "rows"), "dataset_streaming": streamed}
    with pytest.raises(ContractError, match="has no rows"):
        run("sft", monkeypatch, tmp_path, sources, options)


# ------------------------------------------------------------------------------------------------------ from scratch


def test_fresh_weights_have_the_options_of_loaded_ones(monkeypatch, tmp_path, sources):
    main = main_of(TRAININGS["sft"].module)
    monkeypatch.setattr("tokalign.cli.train_sft.SFTTrainer", Recorder)
    words = ["--model_name_or_path", sources["model"], "--dataset_name", sources["one"], "--from_scratch", "true"]
    words += ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    options = ["--dtype", "bfloat16", "--attn_implementation", "eager"]
    plain, told = (main(*parser_of(main).parse_args_and_config([*words, *more])) for more in ([], options))
    assert plain.given["model"].dtype == torch.float32 and told.given["model"].dtype == torch.bfloat16
    assert told.given["model"].config._attn_implementation == "eager"
    assert plain.given["model"].config._attn_implementation != "eager"
    for more in (["--load_in_4bit", "true"], ["--model_init_kwargs", '{"max_position_embeddings": 8}']):
        with pytest.raises(OptionError, match="--from_scratch"):
            main(*parser_of(main).parse_args_and_config([*words, *more]))


# ------------------------------------------------------------------------------------------------------ our own options


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def reads_of(file: Path) -> set[str]:
    """Names that a module reads: attributes, and words by which it may ask for one."""
    nodes = list(ast.walk(tree_of(file)))
    words = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return words | {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


@cache
def hands_all_on(file: Path) -> bool:
    """Whether a module gives every field of an object to something: `f(**vars(x))`, or one after the other."""
    for node in ast.walk(tree_of(file)):
        if not isinstance(node, ast.Call):
            continue
        everything = [keyword.value for keyword in node.keywords if keyword.arg is None]
        if any("vars(" in ast.unparse(part) for part in everything):
            return True
        if ast.unparse(node.func) == "getattr" and not isinstance(node.args[1], ast.Constant):
            return True
        if ast.unparse(node) == "vars(self).items()":
            return True
    return False


@cache
def named_in(file: Path) -> set[str]:
    """Classes that a module defines, and names that it imports."""
    return {node.name for node in ast.walk(tree_of(file)) if isinstance(node, ast.ClassDef | ast.alias)}


FILES = sorted(ROOT.rglob("*.py"))


def modules_that_know(names: set[str]) -> list[Path]:
    """Where one of these classes is defined or imported, and what those modules import from the room of the data."""
    known = [file for file in FILES if named_in(file) & names]
    imported = {
        ROOT.parent.joinpath(*node.module.split(".")).with_suffix(".py")
        for file in known
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tokalign.data.")
    }
    return [*known, *sorted(imported & set(FILES))]


OWN = sorted(
    {
        kind
        for verb in VERBS
        for kind in arguments_of(verb)
        if is_dataclass(kind) and kind.__module__.startswith("tokalign")
    },
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_every_option_of_our_own_is_read(kind):
    """No field of the arguments of a verb is only parsed. What TRL and transformers read of their own is theirs."""
    chain = [base for base in kind.__mro__ if base.__module__.startswith("tokalign") and is_dataclass(base)]
    foreign = (ScriptArguments, DatasetMixtureConfig, ModelConfig, TrainingArguments)
    theirs = {f.name for base in kind.__mro__ if base in foreign for f in fields(base)}
    own = {name for base in chain for name in base.__annotations__} - theirs
    files = modules_that_know({base.__name__ for base in chain})
    unread = own - set().union(*map(reads_of, files))
    assert not unread or any(map(hands_all_on, files)), f"{kind.__name__}: {sorted(unread)}"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (PairsArguments, {"coverage": 0.8, "rule": "best_worst"}, "--coverage is read with --rule frequency alone"),
        (PairsArguments, {"min_margin": 0.5}, "--min_margin is read with --rule best_worst alone"),
        (RewardArguments, {"verifier": True, "reward_index": 1}, "--reward_index is read with --reward_model alone"),
    ],
)
def test_an_option_of_another_choice_is_refused(kind, options, message):
    with pytest.raises(OptionError, match=message):
        kind(dataset="d", output_dir="o", **options)
