"""The structured GRPO trainer: the advantages of the equation, the curriculum, warnings, and an honest baseline."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import statistics

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tests.trainers.structured import (
    KINDS,
    ByToken,
    document,
    make_trainer,
    odd_length,
    problems,
    save_ledger_model,
    settings,
    short_problems,
)
from tokalign.evaluation.run import prompt_ids
from tokalign.prompts import PromptRendering
from tokalign.rewards import StructuredReward
from tokalign.stage.errors import ContractError
from tokalign.trainers import (
    StructuredGRPOConfig,
    StructuredGRPOTrainer,
    TokenCreditGRPOConfig,
    TokenCreditGRPOTrainer,
)

ONE = {"structure": 1.0, "correctness": 0.5}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_ledger_model(tmp_path_factory.mktemp("ledger"))


def scores(reward: StructuredReward, row: dict) -> list[dict]:
    """One prompt's group, scored one by one."""
    return [reward.score(document(row["answer"], kind), row["answer"], row["schema"]) for kind in KINDS]


def generated(trainer) -> dict:
    """The first generation batch as TRL scores it."""
    trainer.model.train()
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def groups_of(trainer) -> list[list[dict]]:
    """Scores of the groups that the first generation batch holds, by the reward alone."""
    by_prompt = {row["prompt"][0]["content"]: row for row in problems(16)}
    order = [inputs["prompt"][0]["content"] for inputs in next(iter(trainer.get_train_dataloader()))][:: len(KINDS)]
    return [scores(StructuredReward(weights=trainer.structured.weights), by_prompt[content]) for content in order]


def test_advantages_are_the_equations(path, tmp_path) -> None:
    """(R − mean) / (std + ε) within each group, R the weighted sum of the components."""
    trainer = make_trainer(path, tmp_path, component_weights=ONE)
    expected = []
    for group in groups_of(trainer):
        totals = [sum(ONE[name] * score[name] for name in ONE) for score in group]
        mean, std = statistics.mean(totals), statistics.stdev(totals)
        expected += [(total - mean) / (std + 1e-4) for total in totals]
    assert len({round(value, 3) for value in expected[: len(KINDS)]}) == len(KINDS)  # four kinds, four rewards
    assert generated(trainer)["advantages"].tolist() == pytest.approx(expected, abs=1e-4)


def test_normalize_then_sum_normalises_each_component_first(path, tmp_path) -> None:
    trainer = make_trainer(path, tmp_path, component_weights=ONE, multi_objective_aggregation="normalize_then_sum")
    assert trainer.reward_weights.tolist() == list(ONE.values())
    sums = []
    for group in groups_of(trainer):
        normal = {}
        for name in ONE:
            values = [score[name] for score in group]
            mean, std = statistics.mean(values), statistics.stdev(values)
            normal[name] = [(value - mean) / (std + 1e-4) for value in values]
        sums += [sum(ONE[name] * normal[name][i] for name in ONE) for i in range(len(group))]
    mean, std = statistics.mean(sums), statistics.stdev(sums)
    expected = [(value - mean) / (std + 1e-4) for value in sums]
    assert generated(trainer)["advantages"].tolist() == pytest.approx(expected, abs=1e-4)


def test_every_component_and_its_empty_groups_are_logged(path, tmp_path) -> None:
    trainer = make_trainer(path, tmp_path, max_steps=1, log_completions=True)
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "structured/structure" in e)
    groups = groups_of(trainer)
    for name in ("structure", "format", "validity", "schema", "correctness"):
        values = [score[name] for group in groups for score in group]
        assert entry[f"structured/{name}"] == pytest.approx(statistics.mean(values), abs=1e-6)
        assert entry[f"structured/{name}/zero_groups"] == 0.0
    assert "structured/length" not in entry  # no bounds, no component
    (table,) = (tmp_path / "completions").glob("*.parquet")
    rows = Dataset.from_parquet(str(table)).to_list()
    assert {row["reason"] for row in rows} >= {None, "text around the document"}
    assert {"structure", "correctness", "advantage"} <= rows[0].keys()


def test_a_component_that_stays_0_is_warned_about_once(path, tmp_path, caplog) -> None:
    """No completion is fenced, so with `fence: required` the format is 0 in every group."""
    trainer = make_trainer(path, tmp_path, max_steps=5, fence="required", plateau_patience=3)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    warnings = [record.getMessage() for record in caplog.records if "The component" in record.getMessage()]
    assert len(warnings) == 1 and "format is 0" in warnings[0] and "3 generations" in warnings[0]
    assert "fence: optional" in warnings[0]
    entries = [e for e in trainer.state.log_history if "structured/format/zero_groups" in e]
    assert [e["structured/format/zero_groups"] for e in entries] == [1.0] * 5


def test_a_component_that_falls_is_warned_about_once(path, tmp_path, caplog) -> None:
    """From the fourth log on correctness lies below the mean of the first ones; structure does not."""
    trainer = make_trainer(path, tmp_path, fall_patience=4, beta=0.1)
    with caplog.at_level(logging.WARNING):
        for step in range(12):
            low = 0.7 - 0.1 * (step > 3)
            trainer.log({"loss": 0.0, "structured/correctness": low, "structured/structure": 0.8 - 0.04 * (step % 2)})
    warnings = [record.getMessage() for record in caplog.records if "The component" in record.getMessage()]
    assert len(warnings) == 1 and "structured/correctness began at 0.68" in warnings[0] and "now at 0.60" in warnings[0]
    assert "4 logs" in warnings[0] and "`learning_rate`" in warnings[0] and "`beta` (now 0.1)" in warnings[0]


def odd_tokens(completion_ids, **_):
    return [[float(t % 2) for t in range(len(ids))] for ids in completion_ids]


def test_a_page_every_few_steps_shows_what_tokens_were_credited_with(path, tmp_path) -> None:
    """Groups as they were generated, each token with its numbers; training is the same without pages."""
    weights = {}
    for steps in (0, 2):
        out = tmp_path / str(steps)
        trainer = make_trainer(path, out, max_steps=3, credit_page_steps=steps, credit_funcs=odd_tokens)
        trainer.train()
        weights[steps] = torch.cat([parameter.flatten() for parameter in trainer.model.parameters()])
    assert torch.equal(weights[0], weights[2]) and not (tmp_path / "0" / "credit").exists()
    assert sorted(file.name for file in (tmp_path / "2" / "credit").iterdir()) == ["step-0.html", "step-2.html"]

    trainer = make_trainer(path, tmp_path / "again", credit_page_steps=1, credit_funcs=odd_tokens)
    batch = generated(trainer)
    page = (tmp_path / "again" / "credit" / "step-0.html").read_text()
    assert page.count("<article data-row>") == 2 and page.count("tokens</h3>") == 8  # two groups of four
    assert "<span>reason <b>text around the document</b></span>" in page and "<span>structured <b>" in page
    titles = re.findall(
        r"position (\d+) · advantage (\S+) · credit/odd_tokens (\S+) · entropy (\S+) · logprob (\S+) ·", page
    )
    assert len(titles) == batch["completion_mask"].sum()
    prompt, completion = (batch[f"{part}_ids"][0][batch[f"{part}_mask"][0].bool()] for part in ("prompt", "completion"))
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
    logs = logits.float().log_softmax(-1)
    for t, (position, *numbers) in enumerate(titles[: len(completion)]):
        entropy = -(logs[t].exp() * logs[t]).sum().item()
        expected = [batch["advantages"][0, t].item(), t % 2, entropy, logs[t, completion[t]].item()]
        assert int(position) == t and [float(n) for n in numbers] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def brevity(completions, **_):
    return [-float(len(completion[0]["content"])) for completion in completions]


def test_rewards_keep_their_order_and_their_weights(path, tmp_path) -> None:
    """With weights [0, 1] the second reward alone trains, whichever kind the first is."""
    own = StructuredReward(weights={"validity": 2.0}, name="mine")
    advantages = {}
    for name, given, weights in (
        ("alone", [own], None),
        ("second", [brevity, own], [0.0, 1.0]),
        ("first", [own, brevity], [1.0, 0.0]),
        ("other", [brevity, own], [1.0, 0.0]),
        ("brevity", [brevity, StructuredReward(weights={"validity": 1.0})], [2.0, 0.0]),
    ):
        tokenizers = [object() for _ in given]  # of reward models; kept beside functions, which read none
        trainer = make_trainer(
            path, tmp_path, reward_funcs=given, reward_weights=weights, reward_processing_classes=tokenizers
        )
        assert trainer.reward_funcs == given and trainer.reward_processing_classes == tokenizers
        advantages[name] = generated(trainer)["advantages"].tolist()
    assert advantages["second"] == advantages["first"] == advantages["alone"] != advantages["other"]
    assert advantages["other"] == pytest.approx(advantages["brevity"], abs=1e-4)


def test_the_reward_of_the_arguments_follows_other_functions(path, tmp_path) -> None:
    trainer = make_trainer(path, tmp_path, reward_funcs=[brevity], reward_weights=[0.5], max_steps=1)
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "reward" in e)
    assert trainer.reward_func_names == ["brevity", "structured"] and trainer.structured.__name__ == "structured"
    total = 0.5 * entry["rewards/brevity/mean"] + entry["rewards/structured/mean"]
    assert entry["reward"] == pytest.approx(total, abs=1e-4)
    assert make_trainer(path, tmp_path, reward_weights=[3.0]).reward_weights.tolist() == [3.0]  # it alone
    with pytest.raises(ValueError, match="`reward_weights` has 2 entries for 1 reward functions; give one for each"):
        make_trainer(path, tmp_path, reward_funcs=[brevity], reward_weights=[1.0, 0.5])
    with pytest.raises(ValueError, match="`reward_processing_classes` has 1 entries for 2 reward functions"):
        make_trainer(path, tmp_path, reward_funcs=[brevity, brevity], reward_processing_classes=[None])


def test_several_structured_rewards_all_count(path, tmp_path) -> None:
    """Each under its name in the log and in the table of completions."""
    rewards = [StructuredReward(weights={"validity": 2.0}, name="a"), StructuredReward(weights=ONE)]
    trainer = make_trainer(path, tmp_path, reward_funcs=rewards, max_steps=1, log_completions=True)
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "reward" in e)
    assert trainer.reward_func_names == ["a", "structured"] and trainer.structured is rewards[0]
    assert entry["a/validity"] == pytest.approx(0.75)  # three of the four kinds are whole documents
    assert entry["structured/structure"] > 0 and entry["a/validity/zero_groups"] == 0
    assert entry["reward"] == pytest.approx(1.5 + entry["rewards/structured/mean"], abs=1e-4)
    (table,) = (tmp_path / "completions").glob("*.parquet")
    rows = Dataset.from_parquet(str(table)).to_list()
    assert {"a/validity", "a/reason", "structure", "correctness", "reason"} <= rows[0].keys()
    assert all((row["a/validity"] == 1) == (row["structure"] > 0.1) for row in rows)
    with pytest.raises(ValueError, match="Two structured rewards are named 'a', and logs tell them apart by it; set"):
        make_trainer(path, tmp_path, reward_funcs=[rewards[0], StructuredReward(name="a")])


def test_components_stand_in_their_rewards_place(path, tmp_path) -> None:
    """Under GDPO each component has its own weight times the reward's; given by hand, they are not added once more."""
    gdpo = {"multi_objective_aggregation": "normalize_then_sum"}
    own = StructuredReward(weights=ONE, name="own")
    args = {"reward_funcs": [brevity, own], "reward_weights": [0.5, 2.0]}
    trainer = make_trainer(path, tmp_path, **args, **gdpo)
    assert trainer.reward_func_names == ["brevity", "own_structure", "own_correctness"]
    assert trainer.reward_weights.tolist() == [0.5, 2.0, 1.0]
    expected = generated(trainer)["advantages"].tolist()
    by_hand = {"reward_funcs": [brevity, *own.component_rewards()], "reward_weights": [0.5, 2.0, 1.0]}
    trainer = make_trainer(path, tmp_path, **by_hand, **gdpo)
    assert trainer.reward_func_names == ["brevity", "own_structure", "own_correctness"] and trainer.structured is own
    assert generated(trainer)["advantages"].tolist() == expected


def test_resumes_exactly(path, tmp_path) -> None:
    """Sampled rollouts, credit by token, dropout-free LoRA: four steps, and two with two more from the checkpoint."""
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")

    def run(name: str, resume: str | None = None, **options):
        trainer = make_trainer(
            path,
            tmp_path / name,
            table=False,
            reward_funcs=[odd_length],
            peft_config=lora,
            max_completion_length=12,
            credit="field",
            credit_funcs=[ByToken()],  # what an untrained model writes has no fields that differ
            **options,
        )
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(tmp_path / name))
        return [e["loss"] for e in trainer.state.log_history if "loss" in e], load_file(
            tmp_path / name / "adapter_model.safetensors"
        )

    losses, weights = run("whole", max_steps=4)
    run("half", max_steps=2, save_strategy="steps", save_steps=2)
    again, resumed = run("rest", str(tmp_path / "half" / "checkpoint-2"), max_steps=4)
    assert again == losses and any(losses)
    assert all((weights[name] == resumed[name]).all() for name in weights)


# --------------------------------------------------------------------------------------- constrained decoding, in eval


@pytest.mark.parametrize("lora", [False, True])
def test_the_constrained_baseline_is_valid_and_touches_nothing_else(lora, path, tmp_path) -> None:
    evaluation = Dataset.from_list(problems(4))
    schema = tmp_path / "schema.json"  # short documents, which an untrained model can finish
    schema.write_text(
        json.dumps({"type": "object", "properties": {"answer": {"enum": [1, 2]}}, "required": ["answer"]})
    )
    rows = [{"prompt": row["prompt"]} for row in problems(16)]
    logs = {}
    for share in (0.0, 0.5):
        trainer = StructuredGRPOTrainer(
            model=path,
            args=StructuredGRPOConfig(
                **settings(
                    tmp_path / str(share),
                    schema=str(schema),
                    constrained_eval_share=share,
                    max_completion_length=24,
                    per_device_eval_batch_size=8,
                )
            ),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=evaluation.remove_columns(["schema", "answer"]),
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        )
        logs[share] = trainer.evaluate()
    constrained = {key: value for key, value in logs[0.5].items() if "constrained" in key}
    assert constrained["eval_constrained/validity"] > 0.5 > logs[0.0]["eval_structured/validity"]
    assert constrained["eval_constrained/schema"] == constrained["eval_constrained/validity"]
    assert not any("constrained" in key for key in logs[0.0])
    assert logs[0.0]["eval_loss"] == logs[0.5]["eval_loss"] and logs[0.0]["eval_reward"] == logs[0.5]["eval_reward"]


def test_the_server_is_asked_once_a_schema_and_answers_go_back_in_order(path, tmp_path) -> None:
    """The server's own weight sync needs a GPU; what is sent to it and how answers are dealt out does not."""
    trainer = make_trainer(path, tmp_path)
    asked = []

    class Client:
        def generate(self, prompts, generation_kwargs, **_):
            asked.append((prompts, generation_kwargs["structured_outputs"]["json"]))
            return {"completion_ids": [[*prompt, 99] for prompt in prompts]}

    class Engine:
        vllm_client = Client()
        temperature, top_p, top_k, max_completion_length = 1.0, 1.0, 0, 8

    trainer.vllm_generation = Engine()
    assert trainer._ask_server([[1], [2], [3]], ["a", "b", "a"]) == [[1, 99], [2, 99], [3, 99]]
    assert asked == [([[1], [3]], "a"), ([[2]], "b")]


def test_constrained_baseline_is_refused_where_it_cannot_work(path, tmp_path) -> None:
    with pytest.raises(ValueError, match="needs output_format 'json'"):
        make_trainer(path, tmp_path, constrained_eval_share=0.5, output_format="yaml")
    trainer = make_trainer(path, tmp_path, constrained_eval_share=0.5)
    trainer.args.use_transformers_continuous_batching = True  # needs a GPU to be built with
    with pytest.raises(ValueError, match="needs use_transformers_continuous_batching false"):
        trainer._check_constrained(trainer.args)
    with pytest.raises(ValueError, match=r"constrained_eval_share is 1\.5; use a share from 0 to 1"):
        StructuredGRPOConfig(**settings(tmp_path, constrained_eval_share=1.5))


# -------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("rollouts", "use_vllm", "mode"),
    [("transformers", False, "colocate"), ("vllm-colocate", True, "colocate"), ("vllm-server", True, "server")],
)
def test_one_key_says_where_rollouts_come_from(rollouts, use_vllm, mode, tmp_path) -> None:
    args = StructuredGRPOConfig(**settings(tmp_path, rollouts=rollouts))
    assert (args.use_vllm, args.vllm_mode) == (use_vllm, mode)
    assert StructuredGRPOConfig(**settings(tmp_path, use_vllm=True)).use_vllm  # TRL's own keys hold where it is unset
    with pytest.raises(ValueError, match="rollouts is 'sglang'; use one of transformers, vllm-colocate, vllm-server"):
        StructuredGRPOConfig(**settings(tmp_path, rollouts="sglang"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": None}, r"Row 2 \(id '2'\): `schema` is missing; give it a JSON Schema, or drop the row"),
        ({"schema": '{"type": "objct"}'}, r"Row 2 \(id '2'\): `schema`: The schema is invalid at /type"),
        ({"schema": '{"$ref": "http://a.b/c"}'}, r"Row 2 \(id '2'\): `schema`: .*http://a.b/c"),
        ({"answer": "{"}, r"Row 2 \(id '2'\): `answer`: is not JSON .*; give the right document as JSON"),
    ],
)
def test_a_bad_row_is_named_before_training(path, tmp_path, change, message) -> None:
    rows = [{**row, "id": str(i)} for i, row in enumerate(problems(4))]
    rows[2] |= change
    with pytest.raises(ContractError, match=message):
        make_trainer(path, tmp_path, rows=rows)


def test_a_dataset_without_schema_or_prompt_is_refused(path, tmp_path) -> None:
    rows = [{"id": row["id"], "prompt": row["prompt"]} for row in problems(4)]
    with pytest.raises(ContractError, match="has no column `schema` and no schema is given for all rows; set `schema`"):
        make_trainer(path, tmp_path, rows=rows, table=False)
    with pytest.raises(ContractError, match="training dataset has no column `prompt`"):
        make_trainer(path, tmp_path, rows=[{"schema": "{}"}], table=False)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("options", "rename", "message"),
    [
        ({"reference_column": "anwser"}, {}, "no column `anwser`; set `reference_column`"),
        ({"schema_column": "shema"}, {}, "no column `shema` and no schema is given for all rows"),
        ({}, {"schema": "shema"}, "no column `schema` and no schema is given for all rows"),
        ({"schema": "{}", "schema_column": "shema"}, {}, "no column `shema`; set `schema_column`"),
    ],
)
def test_a_column_that_is_named_must_be_there(path, tmp_path, streamed, options, rename, message) -> None:
    rows = Dataset.from_list(problems(16)).rename_columns(rename)
    args = StructuredGRPOConfig(**settings(tmp_path, max_completion_length=8, **options))
    with pytest.raises(ContractError, match=message):
        StructuredGRPOTrainer(path, args=args, train_dataset=rows.to_iterable_dataset() if streamed else rows).train()


def test_a_row_of_a_stream_without_its_schema_is_named(path, tmp_path) -> None:
    rows = [{**row, "schema": None} for row in problems(16)]
    args = StructuredGRPOConfig(**settings(tmp_path, max_completion_length=8))
    trainer = StructuredGRPOTrainer(path, args=args, train_dataset=Dataset.from_list(rows).to_iterable_dataset())
    with pytest.raises(ValueError, match=r"^Row '.*': `schema`: is missing; give it a JSON Schema, or drop the row"):
        trainer.train()


def test_columns_of_the_reward_are_not_unused(path, tmp_path) -> None:
    rows = [{**row, "note": "unused"} for row in problems(16)]
    trainer = make_trainer(path, tmp_path, rows=rows, remove_unused_columns=True, component_weights=ONE)
    assert set(next(iter(trainer.get_train_dataloader()))[0]) == {"id", "prompt", "schema", "answer"}
    other = make_trainer(path, tmp_path, rows=rows, component_weights=ONE)
    assert generated(trainer)["advantages"].tolist() == generated(other)["advantages"].tolist()


def test_arguments_of_another_kind_are_refused(path, tmp_path) -> None:
    with pytest.raises(TypeError, match="must be a StructuredGRPOConfig, got GRPOConfig; it has"):
        StructuredGRPOTrainer(path, args=GRPOConfig(**settings(tmp_path)), train_dataset=Dataset.from_list(problems(4)))


def test_no_rows_is_said_at_the_start(path, tmp_path) -> None:
    some = Dataset.from_list(problems(4))
    for rows in (some.select([]), some.to_iterable_dataset().filter(lambda row: False)):
        with pytest.raises(ContractError, match="The training dataset has no rows"):
            StructuredGRPOTrainer(model=path, args=StructuredGRPOConfig(**settings(tmp_path)), train_dataset=rows)
        with pytest.raises(ContractError, match="The evaluation dataset has no rows"):
            make_trainer(path, tmp_path, eval_dataset=rows)


@pytest.mark.parametrize(
    ("method", "config"),
    [(StructuredGRPOTrainer, StructuredGRPOConfig), (TokenCreditGRPOTrainer, TokenCreditGRPOConfig)],
)
def test_a_rows_own_tools_and_variables_are_what_the_model_is_asked_with(
    path, tmp_path, monkeypatch, method, config
) -> None:
    """TRL's prompts where a row has none; else those of sampling and evaluation: as `bfcl --prompt_tools column`."""
    asked = []

    def single_turn(self, prompt_ids, *_):
        asked.extend(prompt_ids)
        raise StopIteration

    monkeypatch.setattr(method, "_generate_single_turn", single_turn)
    rows = [{"id": f"p{i}", **row} for i, row in enumerate(short_problems(2))]
    template = "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{{ how }}{{ messages[0].content }}"
    tools = [json.dumps([{"name": "a"}]), json.dumps([{"name": "b"}])]
    with_tools = [
        {**row, "tools": one, "chat_template_kwargs": {"how": one[11]}} for row, one in zip(rows, tools, strict=True)
    ]
    for given in (rows, with_tools):
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = template
        trainer = method(
            path,
            None if method is StructuredGRPOTrainer else odd_length,
            config(**settings(tmp_path, chat_template_kwargs={"how": "x"})),
            train_dataset=Dataset.from_list(given),
            processing_class=tokenizer,
        )
        asked.clear()
        with contextlib.suppress(StopIteration):
            trainer._generate_and_score_completions(given)
        rendering = PromptRendering(chat_template_kwargs={"how": "x"})
        assert asked == [prompt_ids(row, tokenizer, rendering) for row in given]
        stock = GRPOTrainer._tokenize_prompts(trainer, [row["prompt"] for row in given])[0]
        assert (asked == stock) == (given is rows)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ContractError, match=r"Row 'p0': the chat template refuses these messages \(no system role"):
        trainer._generate_and_score_completions(rows)


def test_a_stream_is_taken_as_it_comes(path, tmp_path) -> None:
    trainer = StructuredGRPOTrainer(
        model=path,
        args=StructuredGRPOConfig(**settings(tmp_path, max_steps=1, max_completion_length=8)),
        train_dataset=Dataset.from_list(problems(16)).to_iterable_dataset(),
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
