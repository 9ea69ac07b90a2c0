"""A LoRA adapter's configuration, checked against the base that it is to sit on."""

from __future__ import annotations

from pathlib import Path

from peft import PeftConfig

from tokalign.stage.hashes import weights_hash


def adapter_config(path: str, base: str | None) -> PeftConfig:
    """Configuration of the LoRA adapter at `path`, refusing one that was trained on a model other than `base`.

    The same base may be recorded under another path. Two folders agree when their weights do; a hub id agrees with a
    folder of the same name.
    """
    try:
        config = PeftConfig.from_pretrained(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"There is no adapter at {path}: give a folder that holds adapter_config.json.") from error
    if config.is_prompt_learning:
        raise ValueError(f"Adapter {path} is of type {config.peft_type}: generation takes LoRA-like adapters only.")
    recorded = config.base_model_name_or_path
    if recorded and base and not _same_model(Path(recorded), Path(base)):
        raise ValueError(
            f"Adapter {path} was trained on {recorded} but this engine holds {base}: load that base, or correct "
            "base_model_name_or_path in its adapter_config.json."
        )
    return config


def _same_model(recorded: Path, held: Path) -> bool:
    if recorded.is_dir() and held.is_dir():
        return recorded.samefile(held) or weights_hash(recorded) == weights_hash(held)
    return recorded.name == held.name
