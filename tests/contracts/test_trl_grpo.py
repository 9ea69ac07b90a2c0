"""What our GRPO trainers rely on in TRL: when one fails, TRL has changed, and the message says where."""

from __future__ import annotations

import inspect
import re

import pytest
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from tests.contracts.names import shared_names
from tokalign.internals.trl import CREDIT_USED, GRPO_OVERRIDDEN, GRPO_USED, OTHERS_USED
from tokalign.trainers import StructuredGRPOTrainer, TokenCreditGRPOTrainer

CALLED = {
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
    "_tokenize_prompts": ["prompts"],
}


@pytest.mark.parametrize("name", GRPO_OVERRIDDEN)
def test_overridden_methods_keep_their_arguments(name) -> None:
    theirs = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)
    ours = list(inspect.signature(getattr(StructuredGRPOTrainer, name)).parameters)
    assert ours == theirs, f"TRL's GRPOTrainer.{name} takes {theirs} in this version: adapt our override."


def test_private_names_that_are_shared_with_trl_are_listed() -> None:
    listed = {*GRPO_OVERRIDDEN, *GRPO_USED}
    assert shared_names(StructuredGRPOTrainer) == listed, "correct the lists in tokalign/internals/trl.py"


@pytest.mark.parametrize("name", CALLED)
def test_called_methods_keep_their_arguments(name) -> None:
    theirs = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)[1:]
    assert theirs == CALLED[name], f"TRL's GRPOTrainer.{name} now takes {theirs}: adapt our call."


@pytest.mark.parametrize("trainer", [TokenCreditGRPOTrainer, StructuredGRPOTrainer])
def test_constructor_takes_trls_arguments_by_their_names(trainer) -> None:
    """Ours names the ones that it reads, in TRL's order, and hands on the others."""
    theirs = list(inspect.signature(GRPOTrainer.__init__).parameters)
    ours = inspect.signature(trainer.__init__).parameters
    placed = [name for name, parameter in ours.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert placed == theirs[: len(placed)] and list(ours)[len(placed) :] == ["credit_funcs", "kwargs"]
    assert "credit_funcs" not in theirs


def test_credit_functions_are_called_as_reward_functions_are() -> None:
    """What TRL gives reward functions beside the columns, which ours gives too, and on which loop async ones run."""
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    given = set(re.findall(r'\breward_kwargs\["(\w+)"\] = ', source))
    assert given == {"trainer_state", "log_extra", "log_metric", "environments"}
    assert 'if key not in ["prompt", "completion", "completion_ids"]' in source and "self.async_loop" in source


def test_advantages_may_be_per_token_and_enter_the_loss_nowhere_else() -> None:
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert source.count('inputs["advantages"]') == 1 and "if advantages.dim() == 1:" in source
    assert '"advantages": advantages,' in inspect.getsource(GRPOTrainer._generate_and_score_completions)


def test_a_batch_is_scored_by_one_list_of_completions() -> None:
    """The reward keeps the scores of the last batch by the identity of that list."""
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    assert "completions=completions" in source and "completions = " not in source
    assert "rewards_per_func = self._calculate_rewards(" in inspect.getsource(
        GRPOTrainer._generate_and_score_completions
    )


def test_metrics_tokenizer_and_engine_are_where_we_read_them() -> None:
    source = inspect.getsource(GRPOTrainer)
    for name in ("_metrics[mode]", "self._tokenizer", "self.eos_token_ids", "self.num_generations_eval"):
        assert name in source, f"GRPOTrainer no longer has {name}, which we read."
    engine = inspect.getsource(VLLMGeneration)
    for name in ("self.llm = LLM(", "self.vllm_client = ", "self.temperature = ", "self.max_completion_length = "):
        assert name in engine, f"TRL's VLLMGeneration no longer has {name!r}, which the constrained baseline reads."
    asleep = 'self.llm.wake_up(tags=["kv_cache"])', "self.llm.sleep(level=2)", "self._llm_weights_sleeping = True"
    assert all(line in engine for line in asleep), "TRL's engine sleeps otherwise now: adapt _generate_constrained."
    assert "merge_adapter()" in engine, "TRL hands adapters to vLLM otherwise now: say so in structured_grpo.py."


def test_the_other_private_names_are_there() -> None:
    assert hasattr(GRPOConfig, "_VALID_DICT_FIELDS") and "_llm_weights_sleeping" in inspect.getsource(VLLMGeneration)
    assert set(OTHERS_USED) == {"_VALID_DICT_FIELDS", "_llm_weights_sleeping"}


def test_what_credit_functions_use_is_there() -> None:
    theirs = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)[1:7]
    ours = ["model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"]
    assert theirs == ours, f"TRL's forward of the policy now takes {theirs}: adapt credits/reading.py."
    source = inspect.getsource(GRPOTrainer)
    assert all(f"self.{name}" in source for name in CREDIT_USED)
    assert list(inspect.signature(GRPOTrainer.get_high_entropy_mask).parameters)[1:] == [
        "entropies",
        "mask",
        "threshold",
    ]


def test_gdpo_is_still_trls_option() -> None:
    assert "normalize_then_sum" in inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert "multi_objective_aggregation" in {f.name for f in GRPOConfig.__dataclass_fields__.values()}
