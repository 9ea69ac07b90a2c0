"""Router training: it learns, it resumes and repeats exactly, two processes are one, and bad labels are refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments, set_seed

from tests.routing.labels import write_labels
from tests.support import tiny_model
from tokalign.cli.main import main
from tokalign.routing.router.calibration import report_on, score_dataset
from tokalign.routing.router.features import RouterDataset
from tokalign.routing.router.metrics import average_precision, ranking_of
from tokalign.routing.router.model import TokenRouter
from tokalign.routing.router.trainer import RouterConfig, RouterTrainer, new_router
from tokalign.stage.errors import ContractError
from tokalign.stage.hashes import weights_hash
from tokalign.statistics import area_under_roc

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "router.py"
SHAPE = {"width": 16, "num_blocks": 1}


@pytest.fixture(scope="module")
def slm(tmp_path_factory) -> str:
    """The model whose embedding routers read; the features are made up."""
    path = str(tmp_path_factory.mktemp("slm"))
    tiny_model(20, hidden_size=8).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def labels(slm, tmp_path_factory) -> Path:
    """The folder of three splits."""
    folder = tmp_path_factory.mktemp("data")
    manifest = {"models": {"slm": {"path": slm, "weights_hash": weights_hash(slm), "tokenizer_hash": "t"}}}
    for seed, (split, rows) in enumerate({"train": 120, "calibration": 60, "test": 60}.items()):
        write_labels(folder, rows=rows, split=split, seed=seed, manifest=manifest)
    return folder / "labels"


def make_trainer(labels: Path, slm: str, output_dir: Path, *, callbacks=(), shape=SHAPE, **changes) -> RouterTrainer:
    train, calibration = (RouterDataset(labels, split=split) for split in ("train", "calibration"))
    arguments = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 64,
        "learning_rate": 5e-3,
        "num_train_epochs": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "shuffle_window": 2,
        "seed": 0,
    } | changes
    args = RouterConfig(**arguments)
    set_seed(args.seed)
    router = new_router(slm, train, **shape)
    router.attach_embedding_of(slm)
    return RouterTrainer(
        model=router, args=args, train_dataset=train, eval_dataset=calibration, callbacks=list(callbacks)
    )


def losses(trainer: RouterTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same_weights(a: TokenRouter, b: TokenRouter) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_defaults_are_the_paper_s(tmp_path):
    args = RouterConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (args.learning_rate, args.weight_decay, args.per_device_train_batch_size) == (5e-5, 5e-4, 1024)
    assert (args.num_train_epochs, args.load_best_model_at_end, args.greater_is_better) == (50, True, False)
    assert args.bf16 is False


def test_a_step_is_the_weighted_loss_of_its_batch(labels, slm, tmp_path):
    shape = SHAPE | {"dropout": 0.0}
    trainer = make_trainer(labels, slm, tmp_path, shape=shape, max_steps=1, eval_strategy="no", save_strategy="no")
    before = make_trainer(labels, slm, tmp_path, shape=shape).model.eval()
    train = trainer.train_dataset
    divergent = int((train.labels == 2).sum())
    assert trainer.pos_weight == trainer.model.config.pos_weight == (len(train) - divergent) / divergent
    batch = train.__getitems__(list(trainer._get_train_sampler())[:64])
    with torch.no_grad():
        logits = before(
            hidden=batch["hidden"],
            token_embedding=before.token_embedding(batch["predicted"]),
            top_logits=batch["top_logits"],
        ).logits.sigmoid()
    terms = [
        -trainer.pos_weight * np.log(s) if y else -np.log(1 - s)
        for s, y in zip(logits.double().tolist(), batch["labels"].tolist(), strict=True)
    ]
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(np.mean(terms), rel=1e-4)


def test_it_learns_and_ends_with_the_best_router(labels, slm, tmp_path):
    shape = SHAPE | {"inputs": ["hidden", "entropy", "token", "logits"]}
    trainer = make_trainer(labels, slm, tmp_path, shape=shape, num_train_epochs=60, learning_rate=3e-3, patience=2)
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_auroc" in entry]
    assert len(evaluations) < 60  # stopped early
    best = min(evaluations, key=lambda entry: entry["eval_weighted_loss"])
    assert len(evaluations) - evaluations.index(best) == 3  # two without improvement behind the best
    calibration = trainer.eval_dataset
    scores = score_dataset(trainer.model, calibration)
    hits, others, _ = ranking_of(scores, calibration.labels, calibration.responses).sums()
    assert best["eval_auroc"] == pytest.approx(area_under_roc(hits, others), abs=1e-6) and best["eval_auroc"] > 0.9
    assert best["eval_auprc"] == pytest.approx(average_precision(hits, others), abs=1e-6)
    wanted, scores = calibration.labels == 2, scores.astype(np.float64)
    terms = np.where(wanted, -trainer.pos_weight * np.log(scores), -np.log(1 - scores))
    assert best["eval_weighted_loss"] == pytest.approx(terms.mean(), rel=1e-4)


def test_the_same_seed_is_the_same_router(labels, slm, tmp_path):
    routers = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = make_trainer(labels, slm, tmp_path / name, seed=seed)
        trainer.train()
        routers.append(trainer.model)
    assert same_weights(routers[0], routers[1]) and not same_weights(routers[0], routers[2])


@pytest.mark.parametrize("stop", [16, 10])  # within an epoch and at its end
def test_killed_and_resumed_equals_undisturbed(labels, slm, tmp_path, stop):
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop + 1:
                raise KeyboardInterrupt

    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "patience": 0}
    whole = make_trainer(labels, slm, tmp_path / "whole", **steps)
    whole.train()
    per_epoch = len(whole.train_dataset) // 64
    assert per_epoch == 10 and whole.state.global_step == 30
    killed = make_trainer(labels, slm, tmp_path / "killed", callbacks=[Kill()], **steps)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    for folder in (tmp_path / "killed").iterdir():
        if int(folder.name.split("-")[1]) > stop:
            shutil.rmtree(folder)
    resumed = make_trainer(labels, slm, tmp_path / "killed", **steps)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 30
    assert same_weights(resumed.model, whole.model)


def test_an_epoch_sees_each_token_once(labels, slm, tmp_path):
    trainer = make_trainer(labels, slm, tmp_path)
    loader = trainer.get_train_dataloader()
    orders = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        orders.append([tuple(row) for batch in loader for row in batch["hidden"].tolist()])
    everything = {
        tuple(row) for row in trainer.train_dataset.__getitems__(range(len(trainer.train_dataset)))["hidden"].tolist()
    }
    for order in orders:
        assert len(order) == 640 == len(set(order)) and set(order) <= everything
    assert orders[0] != orders[1]


def test_the_entropy_router_is_a_threshold_on_entropy(labels, slm, tmp_path):
    shape = {"architecture": "linear", "inputs": ["entropy"]}
    trainer = make_trainer(labels, slm, tmp_path, shape=shape)
    trainer.train()
    entropy = torch.linspace(0, 5, 50)
    logits = trainer.model.eval()(entropy=entropy).logits
    assert (logits.diff() > 0).all()  # strictly monotone


def test_an_adapter_of_a_trained_router(labels, slm, tmp_path):
    """With TRL's `peft_config` the router stays as it is, and adapter and router make one router that scores alike."""
    first = make_trainer(labels, slm, tmp_path / "first", num_train_epochs=1)
    first.train()
    base = str(tmp_path / "router")
    first.save_model(base)

    trained = TokenRouter.from_pretrained(base)
    trained.attach_embedding_of(slm)
    train, calibration = (RouterDataset(labels, split=split) for split in ("train", "calibration"))
    trainer = RouterTrainer(
        model=trained,
        args=RouterConfig(
            output_dir=str(tmp_path / "adapted"),
            per_device_train_batch_size=64,
            learning_rate=5e-3,
            num_train_epochs=2,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=train,
        eval_dataset=calibration,
        peft_config=LoraConfig(r=4, target_modules=["project", "up", "down", "head"]),
    )
    trainer.train()
    trainer.save_model(trainer.args.output_dir)
    assert all("lora_" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    stored = load_file(tmp_path / "adapted" / "adapter_model.safetensors")
    assert stored and all("lora_" in name for name in stored)
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in trained.state_dict().items()}
    assert all(torch.equal(tensor, kept[name]) for name, tensor in load_file(f"{base}/model.safetensors").items())

    whole = PeftModel.from_pretrained(TokenRouter.from_pretrained(base), str(tmp_path / "adapted")).merge_and_unload()
    assert isinstance(whole, TokenRouter)
    whole.attach_embedding_of(slm)
    whole.save_pretrained(tmp_path / "whole")
    again = TokenRouter.from_pretrained(tmp_path / "whole")
    again.attach_embedding_of(slm)
    wanted = score_dataset(trainer.model.merge_and_unload(), calibration)
    np.testing.assert_allclose(score_dataset(again, calibration), wanted, rtol=0, atol=1e-5)
    alone = TokenRouter.from_pretrained(base)
    alone.attach_embedding_of(slm)
    assert np.abs(score_dataset(alone, calibration) - wanted).max() > 1e-3  # the adapter does something


# ------------------------------------------------------------------------------------------------------------ verb


def options(labels: Path, slm: str, output_dir: Path, **changes) -> list[str]:
    chosen = {
        "dataset_name": labels,
        "slm": slm,
        "output_dir": output_dir,
        "width": 16,
        "num_blocks": 1,
        "dropout": 0.0,
        "per_device_train_batch_size": 64,
        "learning_rate": 5e-3,
        "num_train_epochs": 2,
        "target_rate": 0.2,
        "report_to": "none",
        "use_cpu": True,
        "shuffle_window": 2,
    } | changes
    return [text for name, value in chosen.items() for text in (f"--{name}", str(value))]


def test_the_verb_trains_calibrates_and_reports(labels, slm, tmp_path):
    trainer = main(["router", *options(labels, slm, tmp_path / "router")])
    router = TokenRouter.from_pretrained(tmp_path / "router")
    assert same_weights(router, trainer.model)
    assert router.config.slm == {"name": slm, "weights_hash": weights_hash(slm), "tokenizer_hash": "t"}
    assert router.config.calibration["split"] == "calibration"
    assert router.config.calibration["achieved"]["rate"] <= 0.2 and router.config.pos_weight == trainer.pos_weight
    router.check_slm(slm)
    router.attach_embedding_of(slm)
    report = json.loads((tmp_path / "router" / "report.json").read_text())
    assert report["split"] == "test" and report["threshold"]["threshold"] == router.threshold
    again = report_on(router, RouterDataset(labels, split="test", invalid=True))
    assert again["auroc"] == pytest.approx(report["auroc"]) and (tmp_path / "router" / "report.png").exists()
    card = (tmp_path / "router" / "README.md").read_text()
    assert f"- threshold: {router.threshold:.6g}" in card and "| AUROC |" in card
    assert not (tmp_path / "router" / "pytorch_model.bin").exists()


def test_the_verb_needs_its_labels_and_its_slm(labels, slm, tmp_path):
    arguments = options(labels, slm, tmp_path)
    at = arguments.index("--slm")
    with pytest.raises(
        ValueError, match=r"`dataset_name` \(runs/labels/labels\) and `slm` \(the small model\) are requ"
    ):
        main(["router", *arguments[:at], *arguments[at + 2 :]])


@pytest.mark.slow
def test_two_processes_train_as_one(labels, slm, tmp_path):
    """`tokalign router` against recipes/router.py on two processes, with the threshold.

    (Two processes that resume within an epoch: tests/launch/test_matrix.py.)
    """
    steps = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 4,
        "eval_steps": 4,
        "save_total_limit": 9,
    }

    main(["router", *options(labels, slm, tmp_path / "one", **steps)])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = options(labels, slm, tmp_path / "two", per_device_train_batch_size=32, **steps)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPE.parents[1])}
    done = subprocess.run(
        [sys.executable, *launcher, str(RECIPE), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    states = [json.loads((tmp_path / n / "checkpoint-20" / "trainer_state.json").read_text()) for n in ("one", "two")]
    histories = [[entry for entry in state["log_history"] if "eval_weighted_loss" in entry] for state in states]
    for a, b in zip(*histories, strict=True):
        for key in ("eval_weighted_loss", "eval_auroc", "eval_auprc"):
            assert a[key] == pytest.approx(b[key], abs=1e-4)
    assert one["threshold"] == pytest.approx(two["threshold"], abs=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- bad input


def test_labels_of_another_slm_are_refused(labels, slm, tmp_path):
    other = str(tmp_path / "other")
    tiny_model(20, hidden_size=8, seed=1).save_pretrained(other)
    with pytest.raises(ContractError, match=rf"of another SLM \({slm}, weights [0-9a-f]{{12}}\) than {other} \("):
        new_router(other, RouterDataset(labels), **SHAPE)


def test_labels_that_cannot_train_are_refused(slm, tmp_path):
    def trainer(name, relabel, invalid=False, **changes):
        stage = write_labels(tmp_path / name, change=lambda rows: [r.update(label=relabel(r["label"])) for r in rows])
        train = RouterDataset(stage, invalid=invalid)
        router = new_router(slm, train, **SHAPE)
        router.attach_embedding_of(slm)
        arguments = {"per_device_train_batch_size": 8} | changes
        args = RouterConfig(output_dir=str(tmp_path / "out"), use_cpu=True, eval_strategy="no", **arguments)
        return RouterTrainer(model=router, args=args, train_dataset=train)

    with pytest.raises(ContractError, match=r"has no divergent token among \d+, so there is nothing to route"):
        trainer("none", lambda label: [min(value, 1) for value in label])
    with pytest.raises(ContractError, match="has nothing but divergent tokens"):
        trainer("all", lambda label: [2 for _ in label])
    with pytest.raises(ContractError, match="was opened with `invalid=True`"):
        trainer("invalid", lambda label: label, invalid=True)
    with pytest.raises(ValueError, match=r"has \d+ labelled tokens, fewer than one global batch of 1024"):
        trainer("few", lambda label: label, per_device_train_batch_size=1024)


def test_features_that_are_not_the_router_s_are_refused(labels, slm, tmp_path):
    train = RouterDataset(labels)
    router = new_router(slm, train, **SHAPE)
    args = RouterConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="no embedding of its SLM"):
        RouterTrainer(model=router, args=args, train_dataset=train, eval_dataset=train)
    with pytest.raises(TypeError, match="must be a RouterConfig, got TrainingArguments; it has the same fields"):
        RouterTrainer(model=router, args=TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=train)
    router.attach_embedding_of(slm)
    narrow = RouterDataset(write_labels(tmp_path / "narrow", hidden_size=4))
    with pytest.raises(ValueError, match="have hidden size 4, but the router was made for 8"):
        RouterTrainer(model=router, args=args, train_dataset=train, eval_dataset=narrow)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patience": -1}, "`patience` must not be negative, got -1"),
        ({"pos_weight": 0.0}, r"`pos_weight` must be positive, got 0\.0"),
        ({"shuffle_window": 0}, "`shuffle_window` must be at least 1 file, got 0"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(output_dir=str(tmp_path), use_cpu=True, **changes)
