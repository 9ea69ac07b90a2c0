"""TRL's private names (run with TRL 1.15.0 and 1.16.0; docs/versions.md).

Our trainers are subclasses, so what they override, call and read by inheritance is listed by name;
tests/contracts/test_trl_dpo.py and test_trl_grpo.py compare the lists with the code on both sides.
"""

from types import SimpleNamespace
from typing import Any

import trl
from datasets import Dataset
from packaging.version import Version
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer
from trl.chat_template_utils import parse_response
from trl.models import prepare_deepspeed
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import (
    get_callable_name,
    get_config_model_id,
    global_then_local_main_first,
    pad,
    shutdown_event_loop_in_daemon,
    start_event_loop_in_daemon,
)

__all__ = [
    "DataCollatorForPreference",
    "get_callable_name",
    "get_config_model_id",
    "global_then_local_main_first",
    "head_needs_triton",
    "ids_of_dpo_trainer",
    "pad",
    "parse_response",
    "prepare_deepspeed",
    "shutdown_event_loop_in_daemon",
    "start_event_loop_in_daemon",
]

# Of DPOTrainer: the methods that ours override, and what else ours set, call or read.
DPO_OVERRIDDEN = (
    "_precompute_ref_logps",
    "_prepare_dataset",
    "_set_signature_columns_if_needed",
    "compute_loss",
    "compute_ref_log_probs",
)
DPO_USED = (
    "_is_vision_dataset",
    "_metrics",
    "_name",
    "_paper",
    "_precompute_engine",
    "_precompute_model_hash",
    "_signature_columns",
    "_tag_names",
    "_tokenizer",
)

# Of GRPOTrainer, likewise.
GRPO_OVERRIDDEN = (
    "_calculate_rewards",
    "_generate_and_score_completions",
    "_set_signature_columns_if_needed",
    "_tokenize_prompts",
)
GRPO_USED = (
    "_generate_single_turn",
    "_log_completion_extra",
    "_log_metric",
    "_metrics",
    "_signature_columns",
    "_tokenizer",
)

# Of a GRPOTrainer, by credit functions: the policy's forward, and what reward functions have logged of a batch.
CREDIT_USED = ("_get_per_token_logps_and_entropies", "_logs", "_pending_extra_logs", "_pending_metrics")

# Of GRPOConfig: fields that may be given as JSON. Of the vLLM engine that a GRPOTrainer holds: whether it is awake.
OTHERS_USED = ("_VALID_DICT_FIELDS", "_llm_weights_sleeping")

# On a model: where TRL's scripts note the buffers that torch's DistributedDataParallel is to leave alone.
SCRIPTS_USED = ("_ddp_params_and_buffers_to_ignore",)


def head_needs_triton() -> bool:
    """Whether DPOTrainer's fused LM head is a Triton kernel alone; from 1.16 on it has a form in torch beside it."""
    return Version(trl.__version__) < Version("1.16")


def ids_of_dpo_trainer(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The rows as `DPOTrainer` prepares them: end tokens added to texts, templates applied, three columns of ids.

    TRL does this in a method that reads nothing of its trainer but the tokenizer, and of its arguments these three;
    without `max_length` no row is dropped, so that the result stays beside its input.
    """
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    arguments: Any = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    return DPOTrainer._prepare_dataset(trainer, rows, tokenizer, arguments, "preference")
