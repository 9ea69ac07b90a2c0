"""What the caches and the router rely on in transformers: when one fails, transformers has changed."""

from __future__ import annotations

import inspect

import pytest
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, Trainer

from tests.contracts.names import shared_names
from tokalign.generation.cache import RoomyLayer
from tokalign.internals.transformers import (
    MODEL_DEFINED,
    TRAINER_OVERRIDDEN,
    TRAINER_STATE_NAME,
    DynamicLayer,
    attention_of,
    bytes_to_unicode,
    file_or_none,
    init,
)
from tokalign.routing.decode.row_attention import SlotLayer
from tokalign.routing.router.model import TokenRouter
from tokalign.routing.router.trainer import RouterTrainer


def test_private_names_that_are_shared_with_transformers_are_listed() -> None:
    where = "correct the lists in tokalign/internals/transformers.py"
    assert shared_names(RouterTrainer) == set(TRAINER_OVERRIDDEN), where
    assert shared_names(TokenRouter) == set(MODEL_DEFINED), where


@pytest.mark.parametrize("name", TRAINER_OVERRIDDEN)
def test_overridden_methods_of_the_trainer_keep_their_arguments(name) -> None:
    theirs = list(inspect.signature(getattr(Trainer, name)).parameters)
    ours = list(inspect.signature(getattr(RouterTrainer, name)).parameters)
    assert ours == theirs, f"Trainer.{name} takes {theirs} in this version: adapt our override."


@pytest.mark.parametrize(
    ("layer", "name"),
    [(SlotLayer, "get_seq_length"), (RoomyLayer, "reorder_cache")],
)
def test_layers_of_the_cache_keep_their_arguments(layer, name) -> None:
    theirs = list(inspect.signature(getattr(DynamicLayer, name)).parameters)
    ours = list(inspect.signature(getattr(layer, name)).parameters)
    assert ours == theirs, f"DynamicLayer.{name} takes {theirs} in this version: adapt our layers."


def test_layers_of_the_cache_have_the_state_that_ours_set() -> None:
    source = inspect.getsource(DynamicLayer.lazy_initialization)
    assert "self.dtype, self.device = " in source and "self.is_initialized = True" in source
    assert list(inspect.signature(DynamicLayer.update).parameters)[:3] == ["self", "key_states", "value_states"]


def test_a_loaded_model_says_which_attention_it_runs() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = LlamaForCausalLM._from_config(LlamaConfig(vocab_size=9, **sizes), attn_implementation="eager")
    assert attention_of(model.config) == "eager"
    assert [type(layer) for layer in DynamicCache(config=model.config).layers] == [DynamicLayer]


def test_a_configuration_is_a_dataclass() -> None:
    """`TokenRouterConfig` has its fields checked as one."""
    assert hasattr(PreTrainedConfig, "__dataclass_fields__")


def test_files_and_letters_and_starting_values(tmp_path) -> None:
    assert file_or_none(str(tmp_path), "model.safetensors") is None
    assert len(bytes_to_unicode()) == 256 and bytes_to_unicode()[32] == "Ġ"
    assert TRAINER_STATE_NAME == "trainer_state.json"
    assert all(callable(getattr(init, name)) for name in ("zeros_", "ones_", "uniform_"))


def test_the_state_of_a_trainer_is_written_last() -> None:
    """A checkpoint with that file is whole; only the random states of other processes may still be missing."""
    source = inspect.getsource(Trainer._save_checkpoint)
    steps = ("self.save_model(", "self._save_optimizer_and_scheduler(", "TRAINER_STATE_NAME")
    places = [source.find(step) for step in steps]
    assert -1 not in places and places == sorted(places), "a checkpoint is written in another order: adapt is_whole"
