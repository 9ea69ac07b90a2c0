r"""Token router (R2R, arXiv 2505.21600): train on routing labels, calibrate to a budget, report on held-out responses.

    tokalign router --config recipes/qwen3-0.6b-8b/router.yaml --accelerate_config ddp
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/router.py \
        --config recipes/qwen3-0.6b-8b/router.yaml
    tokalign router --dataset_name runs/labels/labels --slm runs/slm --architecture linear --inputs entropy \
        --learning_rate 1e-2 --target_rate 0.12 --output_dir runs/router_entropy

`dataset_name` is the folder of the splits train, calibration and test (`tokalign label`). Early stopping and the
threshold use `calibration`; the report (`report.json`, `report.png`) is of `test`, which nothing is chosen on. Without
a target the router has no threshold: `tokalign calibrate` gives it one later, or another one.
"""

from dataclasses import dataclass, field

import numpy as np
from transformers import set_seed

from tokalign.routing.router.arguments import TargetArguments
from tokalign.routing.router.calibration import calibrate_router, report_on
from tokalign.routing.router.features import RouterDataset
from tokalign.routing.router.metrics import print_report
from tokalign.routing.router.trainer import RouterConfig, RouterTrainer, new_router
from tokalign.trainers.checkpoints import resume_point


@dataclass
class RouterScriptArguments:
    """Labels and the small model. Of TRL's script arguments those that labels have, which are folders here."""

    dataset_name: str | None = field(default=None, metadata={"help": "Folder of the labels' splits."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split of the report."})
    slm: str | None = field(default=None, metadata={"help": "The small model, by hub id or folder."})
    dataset_calibration_split: str = field(
        default="calibration", metadata={"help": "Split of early stopping and threshold."}
    )


@dataclass
class RouterModelArguments:
    """Shape of the router; the defaults are the paper's."""

    inputs: list[str] = field(
        default_factory=lambda: ["hidden", "token", "logits"],
        metadata={"help": "What it reads, of 'hidden', 'token', 'logits' and 'entropy'."},
    )
    architecture: str = field(default="mlp", metadata={"help": "'mlp' or 'linear'.", "choices": ["mlp", "linear"]})
    width: int = field(default=1024, metadata={"help": "Width of the MLP."})
    expansion: int = field(default=4, metadata={"help": "Width inside a block, in widths."})
    num_blocks: int = field(default=6, metadata={"help": "Residual blocks."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout in the blocks."})


def main(
    script_args: RouterScriptArguments,
    target: TargetArguments,
    model_args: RouterModelArguments,
    training_args: RouterConfig,
) -> RouterTrainer:
    """Train, calibrate, report, save to `training_args.output_dir`, return the trainer."""
    if script_args.dataset_name is None or script_args.slm is None:
        raise ValueError("`dataset_name` (runs/labels/labels) and `slm` (the small model) are required.")
    name = script_args.dataset_name
    train = RouterDataset(name, split=script_args.dataset_train_split)
    calibration = RouterDataset(name, split=script_args.dataset_calibration_split)
    # Rates count all tokens, also those without a verdict, which training leaves out
    held_out = [
        RouterDataset(name, split=split, invalid=True)
        for split in (script_args.dataset_calibration_split, script_args.dataset_test_split)
    ]
    set_seed(training_args.seed)
    router = new_router(script_args.slm, train, **vars(model_args))
    if "token" in model_args.inputs:
        ids = np.unique(np.concatenate([split.predicted_ids() for split in (train, *held_out)]))
        router.attach_embedding_of(script_args.slm, ids)
    trainer = RouterTrainer(model=router, args=training_args, train_dataset=train, eval_dataset=calibration)
    trainer.train(resume_from_checkpoint=resume_point(training_args))
    if target.given:
        calibrate_router(router, held_out[0], **target.given)
    trainer.save_model(training_args.output_dir)
    main_process = trainer.is_world_process_zero()
    report = report_on(router, held_out[1], training_args.output_dir if main_process else None)
    if main_process:
        print_report(report, f"Router on {held_out[1].folder}")
    trainer.create_model_card(report=report, dataset_name=name)
    if training_args.push_to_hub:
        trainer.push_to_hub(report=report, dataset_name=name)
    return trainer
