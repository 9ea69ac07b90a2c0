"""Every YAML under recipes/ is read by the verb that its first comment names, and trains a tiny model for two steps.

The tiny model and data stand in for the YAML's own; everything else (losses, adapters, batch, schedule) is as written.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from tests.cli.commands import Command, command, comment, indented_commands
from tests.launch.support import write_preferences, write_sft
from tests.routing.labels import write_labels

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
PAPER_MODELS = ["llama-3-8b", "llama-3-70b", "deepseek-math-7b", "qwen2.5-7b"]
TREG_MODELS = {"llama-3-8b-instruct": "dpo", "qwen2.5-7b-instruct": "dpo", "gemma-2-9b-it": "simpo"}  # and base loss
STRUCTURED_MODELS = ["qwen3-4b-instruct", "llama-3.1-8b-instruct", "qwen2.5-1.5b-instruct"]
METHODS = ["critical_dpo", "dpo", "negative_sft", "positive_sft", "rpo", "sample_rollouts", "sft"]
ROUTED_PAIRS = ["deepseek-r1-distill-qwen-1.5b-32b", "qwen3-0.6b-8b", "qwen3-1.7b-32b"]
OFFLINE = ("sample_rollouts", "score_token_rewards", "label_routing", "generate_routed", "quickstart")  # no training
TRAINING = [path for path in RECIPES if path.stem not in (*OFFLINE, "router")]
ROUTERS = [path for path in RECIPES if path.stem == "router"]
MODEL_AND_PATHS = {"model_name_or_path", "model", "dataset_name", "output_dir"}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def commands_of(path: Path) -> list[Command]:
    """The commands in the YAML's header that read this YAML: the verb, and the same by a launcher."""
    commands = [words for words in indented_commands(comment(path)) if f"recipes/{name_of(path)}" in words]
    assert commands, f"{name_of(path)} does not open with the command that runs it"
    return [command(words) for words in commands]


def options_of(overrides: dict[str, str]) -> list[str]:
    return [part for key, value in overrides.items() for part in (f"--{key}", value)]


@pytest.fixture(scope="module")
def stages(tiny_path, tmp_path_factory) -> dict[str, str]:
    """Per training verb, a dataset with all splits that a recipe may name."""
    stages = {}
    for verbs, write in ((("sft",), write_sft), (("dpo", "critical-dpo", "treg"), write_preferences)):
        folder = tmp_path_factory.mktemp(verbs[0])
        for split in ("train", "validation", "test"):
            write(folder / split, tiny_path, rows=8)
        stages |= dict.fromkeys(verbs, str(folder))
    folder = tmp_path_factory.mktemp("structured_grpo")
    schema = {"type": "object", "properties": {"name": {}, "arguments": {"type": "object"}}, "required": ["name"]}
    answer = {"name": "f", "arguments": {"x": [1]}}  # a tool call's allowed values, or any document
    rows = [
        {
            "id": str(i),
            "prompt": [{"role": "user", "content": f"Call f with {i}."}],
            "schema": json.dumps(schema),
            "answer": json.dumps(answer),
        }
        for i in range(16)  # one generation batch of the widest recipe
    ]
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    stages |= dict.fromkeys(("structured-grpo", "token-credit-grpo"), str(folder))
    return stages


@pytest.fixture(scope="module")
def labels(tiny_path, tmp_path_factory) -> dict[str, str]:
    """Routing labels with features of the tiny model's width."""
    folder = tmp_path_factory.mktemp("labels")
    for seed, split in enumerate(("train", "calibration", "test")):
        write_labels(folder, hidden_size=32, top_k=20, vocab=60, seed=seed, split=split)
    return {"slm": tiny_path, "dataset_name": str(folder / "labels")}


def test_all_recipes_are_there() -> None:
    for model in PAPER_MODELS:
        assert sorted(path.stem for path in RECIPES if path.parent.name == model) == METHODS
    for model, base in TREG_MODELS.items():
        methods = sorted([base, "sample_rollouts", "score_token_rewards", "treg"])
        assert sorted(path.stem for path in RECIPES if path.parent.name == model) == methods


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_is_read_without_unknown_keys(path: Path, tmp_path: Path) -> None:
    first, *others = commands_of(path)
    parsed = first.read()
    assert all(len(other.read()) == len(parsed) for other in others)
    for key, value in yaml.safe_load(path.read_text()).items():
        if key == "report_to" and value == "none":
            value = []  # transformers' own reading of it
        assert [getattr(group, key) for group in parsed if hasattr(group, key)] == [value], key
    misspelt = tmp_path / path.name
    misspelt.write_text("lerning_rate: 1.0\n" + path.read_text())
    options = [str(misspelt) if word == f"recipes/{name_of(path)}" else word for word in first.options]
    with pytest.raises(ValueError, match="lerning_rate"):
        first._replace(options=options).read()


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_recipe_trains_two_steps(path: Path, tiny_path: str, stages: dict[str, str], tmp_path: Path) -> None:
    recipe = commands_of(path)[0]
    overrides = {
        "model_name_or_path": tiny_path,
        "dataset_name": stages[recipe.verb],
        "output_dir": str(tmp_path),
        "max_steps": "2",
        "logging_steps": "1",
        "save_strategy": "no",
        "bf16": "false",
        "dtype": "float32",
        "report_to": "none",
        "disable_tqdm": "true",
    }
    if recipe.verb == "structured-grpo":  # tests/launch/test_structured_grpo.py has vLLM's rollouts
        overrides |= {"rollouts": "transformers", "max_completion_length": "8", "num_completions_to_print": "1"}
        overrides |= {"vllm_enable_sleep_mode": "false"}
    if recipe.verb == "token-credit-grpo":
        overrides |= {"max_completion_length": "8"}
    trainer = recipe.main(*recipe.read(*options_of(overrides)))
    assert trainer.state.global_step == 2
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    options = yaml.safe_load(path.read_text())
    if recipe.verb.endswith("-grpo"):  # a random model earns nothing: no gradient, but every stage was run
        assert trainer.num_generations == options["num_generations"]
        assert (tmp_path / "curriculum.png").exists() == (recipe.verb == "structured-grpo")
        return
    if options.get("use_peft"):
        adapter = load_file(tmp_path / "adapter_model.safetensors")
        moved = {key.split(".")[-3] for key, value in adapter.items() if "lora_B" in key and value.any()}
        every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        targets = options["lora_target_modules"]
        assert moved == (every if targets == "all-linear" else set(targets))
    else:
        assert load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_recipes_of_a_method_differ_only_in_model_and_paths(method: str) -> None:
    own = MODEL_AND_PATHS | {"tensor_parallel_size"}  # a 70B model is generated with on several GPUs
    options = [yaml.safe_load((ROOT / "recipes" / model / f"{method}.yaml").read_text()) for model in PAPER_MODELS]
    shared = [{key: value for key, value in o.items() if key not in own} for o in options]
    assert all(s == shared[0] for s in shared)
    for model, option in zip(PAPER_MODELS, options, strict=True):
        assert option["output_dir"].startswith(f"runs/{model}-gsm8k/")


def test_recipes_hold_the_settings_of_the_paper() -> None:
    def of(method: str) -> dict[str, Any]:
        return yaml.safe_load((ROOT / "recipes" / "llama-3-8b" / f"{method}.yaml").read_text())

    expected: dict[str, dict[str, Any]] = {
        method: {
            "num_train_epochs": 1,
            "learning_rate": 3e-4,
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_target_modules": ["gate_proj", "up_proj", "down_proj"],
        }
        for method in ("positive_sft", "negative_sft")
    }
    for method, rate in (("critical_dpo", 4e-5), ("dpo", 2e-5), ("rpo", 2e-5)):
        expected[method] = {
            "num_train_epochs": 3,
            "learning_rate": rate,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_target_modules": "all-linear",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "max_length": 1500,
            "beta": 0.1,
        }
    expected["critical_dpo"] |= {"weight_side": "rejected", "aggregation": "sequence"}
    expected["dpo"]["weight_side"] = expected["rpo"]["weight_side"] = "none"
    expected["rpo"]["loss_type"] = ["sigmoid", "sft"]
    expected["sample_rollouts"] = {"num_rollouts": 64}
    for method, settings in expected.items():
        assert settings.items() <= of(method).items(), method


def test_released_recipes_hold_the_settings_of_the_released_code() -> None:
    """configs/train_config.py, train/train_cdpo.py and train/train_sft.py of chenzhiling9954/Critical-Tokens-Matter."""
    sft = {"learning_rate": 3e-4, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "per_device_train_batch_size": 6}
    sft |= {"warmup_steps": 100, "lr_scheduler_type": "cosine", "num_train_epochs": 1, "max_length": 1024}
    dpo = {"learning_rate": 4e-5, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "num_train_epochs": 3}
    dpo |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "warmup_steps": 0.1, "max_length": 1500}
    dpo |= {"weight_decay": 0.01, "beta": 0.1, "aggregation": "position", "end_token_weight": 1.0}
    for method, settings in (("positive_sft", sft), ("negative_sft", sft), ("critical_dpo", dpo)):
        path = ROOT / "recipes" / "llama-3-8b-released" / f"{method}.yaml"
        assert settings.items() <= yaml.safe_load(path.read_text()).items(), method
    assert "lr_scheduler_type" not in yaml.safe_load(path.read_text())  # the default, which falls to 0 in a line


@pytest.mark.parametrize(("model", "base"), TREG_MODELS.items())
def test_treg_and_its_base_differ_only_in_alpha(model: str, base: str) -> None:
    treg, plain = (yaml.safe_load((ROOT / "recipes" / model / f"{m}.yaml").read_text()) for m in ("treg", base))
    assert treg.pop("alpha") in (0.1, 0.25, 0.5) and plain.pop("alpha") == 0.0  # the paper's grid
    assert treg.pop("output_dir") != plain.pop("output_dir")
    assert treg == plain and treg["base_loss"] == base
    rollouts = yaml.safe_load((ROOT / "recipes" / model / "sample_rollouts.yaml").read_text())
    assert rollouts["num_rollouts"] == 5  # the paper's


def test_structured_grpo_holds_the_settings_of_the_paper() -> None:
    for model in STRUCTURED_MODELS:
        assert [path.stem for path in RECIPES if path.parent.name == model] == ["structured_grpo"]
    options = yaml.safe_load((ROOT / "recipes" / "qwen3-4b-instruct" / "structured_grpo.yaml").read_text())
    paper = {"lora_r": 32, "lora_alpha": 32, "learning_rate": 5e-6, "lr_scheduler_type": "cosine", "max_steps": 250}
    assert (paper | {"num_generations": 6}).items() <= options.items()


@pytest.mark.parametrize("path", ROUTERS, ids=name_of)
def test_router_recipe_trains_two_steps(path: Path, labels: dict[str, str], tmp_path: Path) -> None:
    overrides = {
        "slm": labels["slm"],
        "dataset_name": labels["dataset_name"],
        "output_dir": str(tmp_path),
        "max_steps": "2",
        "logging_steps": "1",
        "per_device_train_batch_size": "8",
        "disable_tqdm": "true",
    }
    recipe = commands_of(path)[0]
    trainer = recipe.main(*recipe.read(*options_of(overrides)))
    assert trainer.state.global_step == 2
    config = json.loads((tmp_path / "config.json").read_text())
    target = yaml.safe_load(path.read_text())["target_rate"]
    assert config["calibration"]["target"] == {"target_rate": target}
    assert config["calibration"]["achieved"]["rate"] <= target and config["threshold"] > 0
    assert {"README.md", "model.safetensors", "report.json", "report.png"} <= {p.name for p in tmp_path.iterdir()}


def test_routers_hold_the_settings_of_the_paper() -> None:
    """Those of real pairs: the architecture is the default, and 8 devices make the batch of 1024."""
    for pair in ROUTED_PAIRS:
        assert sorted(p.stem for p in RECIPES if p.parent.name == pair) == [
            "generate_routed",
            "label_routing",
            "router",
        ]
        options = yaml.safe_load((ROOT / "recipes" / pair / "router.yaml").read_text())
        paper = {"learning_rate": 5e-5, "weight_decay": 5e-4, "num_train_epochs": 50}
        assert (paper | {"per_device_train_batch_size": 128}).items() <= options.items()
        assert not {"architecture", "inputs", "width", "num_blocks", "expansion", "dropout"} & set(options)
