"""PEFT's private names (run with the versions in docs/versions.md). Held by tests/contracts/test_peft.py."""

from peft import PeftModel


def adapters_are_off(model: PeftModel) -> bool:
    """Whether `disable_adapter()` is in force, so that the model answers as its base."""
    return model._adapters_disabled
