"""Metrics and thresholds against brute force over every threshold, and the calibration of a router on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict

import numpy as np
import pytest
import torch

from tests.routing.labels import write_labels
from tests.support import tiny_model
from tokalign.cli.main import main
from tokalign.routing.router import metrics
from tokalign.routing.router.calibration import calibrate, calibrate_router, measure, report_on, score_dataset
from tokalign.routing.router.features import RouterDataset
from tokalign.routing.router.model import TokenRouter, TokenRouterConfig
from tokalign.stage.hashes import weights_hash


def tokens(n: int = 200, seed: int = 0, levels: int = 25) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with many ties, labels that they half predict, responses."""
    draw = np.random.default_rng(seed)
    scores = draw.integers(1, levels, n).astype(np.float32) / np.float32(levels)
    labels = np.where(draw.random(n) < scores**2, 2, draw.integers(0, 2, n))
    labels[draw.random(n) < 0.05] = -1
    return scores, labels, draw.integers(0, 30, n) * 7


def at(scores, labels, responses, threshold) -> tuple[float, float, float]:
    """Rate, recall and accuracy of a threshold, by the definitions."""
    routed = [score >= threshold for score in scores.tolist()]
    wanted = [r for r, label in zip(routed, labels, strict=True) if label == 2]
    good = [
        all(r for r, label, own in zip(routed, labels, responses, strict=True) if own == response and label == 2)
        for response in set(responses.tolist())
    ]
    return sum(routed) / len(routed), sum(wanted) / len(wanted), sum(good) / len(good)


# --------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("seed", range(4))
def test_areas_and_recall_equal_brute_force(seed):
    scores, labels, responses = tokens(seed=seed)
    told, divergent = labels >= 0, labels == 2
    positive, negative = scores[divergent], scores[told & ~divergent]
    pairs = [(p > q) + (p == q) / 2 for p in positive for q in negative]
    precision = average = last = 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        hits = int((positive >= threshold).sum())
        precision = hits / max(1, hits + int((negative >= threshold).sum()))
        average += (hits / len(positive) - last) * precision
        last = hits / len(positive)
    rates = [0.0, 0.01, 0.1, 0.3, 0.77, 1.0]
    recalls = [
        max(r for t in [*set(scores.tolist()), 2.0] for q, r, _ in [at(scores, labels, responses, t)] if q <= rate)
        for rate in rates
    ]
    hits, others, everything = metrics.ranking_of(scores, labels, responses).sums()
    assert metrics.area_under_roc(hits, others) == pytest.approx(np.mean(pairs))
    assert metrics.average_precision(hits, others) == pytest.approx(average)
    assert metrics.recall_at(hits, everything, rates).tolist() == pytest.approx(recalls)


def test_weights_of_responses_equal_repeated_responses():
    scores, labels, responses = tokens()
    ranking = metrics.ranking_of(scores, labels, responses)
    weights = np.random.default_rng(5).integers(0, 3, len(ranking.rows))
    repeated = np.concatenate(
        [np.flatnonzero(responses == r) for r, w in zip(ranking.rows, weights, strict=True) for _ in range(w)]
    )
    hits, others, everything = ranking.sums(weights)
    plain = metrics.ranking_of(scores[repeated], labels[repeated], responses[repeated]).sums()
    assert metrics.area_under_roc(hits, others) == pytest.approx(metrics.area_under_roc(*plain[:2]))
    assert metrics.average_precision(hits, others) == pytest.approx(metrics.average_precision(*plain[:2]))
    recall = metrics.recall_at(hits, everything, [0.1, 0.4])
    assert recall.tolist() == pytest.approx(metrics.recall_at(plain[0], plain[2], [0.1, 0.4]).tolist())


def test_reliability_equals_a_plain_loop():
    draw = np.random.default_rng(0)
    probability = np.r_[draw.random(300) ** 2, 0.0, 1.0, 0.1]
    divergent = draw.random(303) < probability
    result = metrics.reliability(probability, divergent, bins=5)
    predicted, observed, error = [], [], 0.0
    for b in range(5):
        inside = [i for i, p in enumerate(probability) if min(int(p * 5), 4) == b]
        if inside:
            predicted.append(np.mean(probability[inside]))
            observed.append(np.mean(divergent[inside]))
            error += len(inside) / 303 * abs(predicted[-1] - observed[-1])
    assert result["predicted"] == pytest.approx(predicted) and result["observed"] == pytest.approx(observed)
    assert result["ece"] == pytest.approx(error) and sum(result["tokens"]) == 303


def test_probabilities_take_the_weight_out_of_scores():
    logits = np.linspace(-4, 4, 9)
    expected = 1 / (1 + np.exp(-(logits - np.log(7))))
    assert metrics.probabilities(1 / (1 + np.exp(-logits)), 7.0) == pytest.approx(expected)


def test_the_report_holds_the_values_and_intervals_around_them(tmp_path):
    scores, labels, responses = tokens(1000)
    report = metrics.router_report(scores, labels, responses, samples=200)
    for key in ("auroc", "auprc"):
        low, high = report[f"{key}_ci95"]
        assert low < report[key] < high and high - low < 0.2
    assert report["tokens"] == 1000 and report["invalid"] == (labels == -1).sum() and report["responses"] == 30
    assert report["divergent_share"] == pytest.approx((labels == 2).sum() / (labels >= 0).sum())
    for rate, entry in report["recall_at_rate"].items():
        assert entry["ci95"][0] <= entry["recall"] <= entry["ci95"][1], rate
    assert report["curve"]["rate"][-1] == report["curve"]["recall"][-1] == 1.0
    report["threshold"] = asdict(measure(scores, labels, responses, 0.5))
    metrics.plot_reports({"router": report}, tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000
    metrics.print_report(report, "Router")


def test_measures_without_both_kinds_are_refused():
    scores, labels, responses = tokens()
    with pytest.raises(ValueError, match=r"There are 0 divergent and \d+ other tokens"):
        metrics.ranking_of(scores, np.minimum(labels, 1), responses)
    with pytest.raises(ValueError, match=r"There are \d+ divergent and 0 other tokens"):
        metrics.ranking_of(scores, np.where(labels == 2, 2, -1), responses)
    with pytest.raises(ValueError, match=r"scores \(200,\), labels \(199,\) and responses \(200,\) must be vectors"):
        metrics.ranking_of(scores, labels[1:], responses)
    scores[17] = np.nan
    with pytest.raises(ValueError, match="The score of token 17 is not finite"):
        metrics.ranking_of(scores, labels, responses)


# ----------------------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("levels", [25, 10_000])
@pytest.mark.parametrize(
    ("kind", "target"), [("rate", 0.2), ("rate", 0.5), ("rate", 1.0), ("recall", 0.8), ("recall", 1.0)]
)
def test_calibrate_equals_brute_force(seed, levels, kind, target):
    scores, labels, responses = tokens(seed=seed, levels=levels)
    result = calibrate(scores, labels, responses, **{f"target_{kind}": target}, samples=50)
    every = [at(scores, labels, responses, t) for t in set(scores.tolist())]
    if kind == "rate":
        best = max(value for value in every if value[0] <= target)
        assert result.rate <= target
    else:
        best = min(value for value in every if value[1] >= target)
        assert result.recall >= target
    assert (result.rate, result.recall, result.accuracy) == pytest.approx(best)
    assert at(scores, labels, responses, result.threshold) == pytest.approx(best)
    assert (result.n_tokens, result.n_responses) == (200, len(set(responses.tolist())))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("target", [0.7, 0.9, 1.0])
def test_calibrate_to_an_accuracy_equals_brute_force(seed, target):
    scores, labels, responses = tokens(seed=seed)
    responses = np.arange(200) // 4
    result = calibrate(scores, labels, responses, target_accuracy=target, samples=50)
    best = min(v for v in (at(scores, labels, responses, t) for t in set(scores.tolist())) if v[2] >= target)
    assert (result.rate, result.recall, result.accuracy) == pytest.approx(best)


def test_the_threshold_keeps_off_the_scores_and_fits_fp32():
    responses, labels = np.arange(4), np.array([0, 2, 1, 2])
    result = calibrate(np.array([0.1, 0.2, 0.4, 0.8]), labels, responses, target_rate=0.5)
    assert result.threshold == float(np.float32(0.3))
    near = np.array([0.5, np.nextafter(np.float32(0.5), np.float32(1))])
    result = calibrate(near, np.array([0, 2]), np.arange(2), target_rate=0.5)
    assert (torch.tensor(near, dtype=torch.float32) >= result.threshold).tolist() == [False, True]
    assert calibrate(near, np.array([0, 2]), np.arange(2), target_rate=1.0).threshold == 0.0


def test_the_intervals_are_those_of_a_bootstrap_over_responses():
    scores, labels, responses = tokens(600)
    result = measure(scores, labels, responses, 0.6, samples=2000)
    distinct = np.unique(responses)
    draw = np.random.default_rng(9)
    values = []
    for _ in range(400):
        drawn = draw.choice(distinct, len(distinct))
        parts = [np.flatnonzero(responses == r) for r in drawn]
        own = np.concatenate(parts)
        renamed = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        values.append(at(scores[own], labels[own], renamed, 0.6))
    for index, name in enumerate(("rate", "recall", "accuracy")):
        low, high = np.quantile([value[index] for value in values], [0.025, 0.975])
        assert result.ci[name] == pytest.approx([low, high], abs=0.035)
        assert result.ci[name][0] <= getattr(result, name) <= result.ci[name][1]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "Give exactly one of target_rate, target_recall and target_accuracy, not 0"),
        ({"target_rate": 0.1, "target_recall": 0.9}, "exactly one of .* not 2"),
        ({"target_rate": 0.0}, "target_rate is 0.0: use a share above 0 and up to 1"),
        ({"target_recall": 1.1}, "target_recall is 1.1: use a share"),
        ({"target_rate": 0.001}, r"target_rate 0.001 is out of reach: the \d+ highest of 200 tokens score alike"),
        (
            {"target_accuracy": 0.01},
            r"target_accuracy 0.01 is met without the LLM: \d+ of \d+ responses have no diverg",
        ),
    ],
)
def test_targets_out_of_reach_are_refused(target, message):
    scores, labels, _ = tokens()
    with pytest.raises(ValueError, match=message):
        calibrate(scores, labels, np.arange(200), **target)


def test_recall_without_a_divergent_token_is_refused():
    scores, labels, responses = tokens()
    with pytest.raises(ValueError, match="There is no divergent token to reach target_recall on"):
        calibrate(scores, np.minimum(labels, 1), responses, target_recall=0.9)
    result = calibrate(scores, np.minimum(labels, 1), responses, target_rate=0.5)
    assert result.recall == 1.0 and result.ci["recall"] == [1.0, 1.0]


# --------------------------------------------------------------------------------------------------- router on disk


def entropy_router(weight: float = 1.0, **changes) -> TokenRouter:
    config = TokenRouterConfig(
        hidden_size=8, shared_vocab=20, top_k=5, architecture="linear", inputs=["entropy"], **changes
    )
    router = TokenRouter(config)
    router.head.weight.data.fill_(weight)
    return router


def test_scores_of_a_dataset_equal_one_at_a_time(tmp_path):
    dataset = RouterDataset(write_labels(tmp_path), invalid=True)
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "embedding_size": 6, "shared_vocab": 20, "top_k": 5, "width": 16, "num_blocks": 1}
    router = TokenRouter(TokenRouterConfig(**shape, dropout=0.5)).train()
    embedding = torch.randn(20, 6)
    router.attach_embedding(embedding)
    scores = score_dataset(router, dataset, batch_size=7)
    assert router.training and scores.dtype == np.float32
    router.eval()
    for index in (0, 8, len(dataset) - 1):
        item = dataset[index]
        logits = router(
            hidden=item["hidden"][None],
            token_embedding=embedding[item["predicted"]][None],
            top_logits=item["top_logits"][None],
        ).logits
        assert scores[index] == pytest.approx(logits.sigmoid().item(), abs=1e-6)


def test_calibrate_router_stores_the_threshold_and_how_it_was_found(tmp_path, caplog):
    stage = write_labels(tmp_path / "data")
    router = entropy_router()
    router.save_pretrained(tmp_path / "router")
    weights = (tmp_path / "router" / "model.safetensors").read_bytes()
    result = calibrate_router(router, stage, output_dir=tmp_path / "router", target_rate=0.2, samples=50)
    again = TokenRouter.from_pretrained(tmp_path / "router")
    assert again.threshold == result.threshold and result.rate <= 0.2
    stored = again.config.calibration
    assert stored["target"] == {"target_rate": 0.2} and stored["split"] == "train"
    assert stored["achieved"]["rate"] == result.rate and "threshold" not in stored["achieved"]
    assert stored["labels"] == hashlib.sha256((stage / "manifest.json").read_bytes()).hexdigest()
    assert (tmp_path / "router" / "model.safetensors").read_bytes() == weights
    assert again.config.architectures == ["TokenRouter"]
    # tokens without a verdict count in the rate
    assert stored["achieved"]["n_tokens"] == len(RouterDataset(stage, invalid=True)) > len(RouterDataset(stage))
    with caplog.at_level(logging.WARNING, logger="tokalign.routing.router.calibration"):
        calibrate_router(again, stage, target_rate=0.4, samples=50)
    assert "The router's threshold was" in caplog.text  # never silently


def test_another_slm_s_labels_are_refused(tmp_path):
    stage = write_labels(tmp_path / "a", manifest={"models": {"slm": {"weights_hash": "b" * 64}}})
    with pytest.raises(ValueError, match=r"of another SLM \(weights bbbbbbbbbbbb\) than the router's \(aaaaaaaaaaaa\)"):
        calibrate_router(entropy_router(slm={"weights_hash": "a" * 64}), stage, target_rate=0.1)
    narrow = write_labels(tmp_path / "b", hidden_size=4)
    with pytest.raises(ValueError, match="have hidden size 4, but the router was made for 8"):
        calibrate_router(entropy_router(), narrow, target_rate=0.1)
    short = write_labels(tmp_path / "c", top_k=3)
    with pytest.raises(ValueError, match="have number of top logits 3, but the router was made for 5"):
        calibrate_router(entropy_router(), short, target_rate=0.1)
    reads_tokens = TokenRouter(TokenRouterConfig(hidden_size=8, shared_vocab=20, top_k=5, width=8, num_blocks=1))
    with pytest.raises(ValueError, match=r"no embedding of its SLM: call router\.attach_embedding_of"):
        calibrate_router(reads_tokens, write_labels(tmp_path / "d"), target_rate=0.1)


# -------------------------------------------------------------------------------------------------------------- verb


def calibrate_verb(**options):
    """`tokalign calibrate` with these options."""
    return main(["calibrate", *(part for name, value in options.items() for part in (f"--{name}", str(value)))])


def test_the_verb_calibrates_and_reports(tmp_path):
    slm = str(tmp_path / "slm")
    tiny_model(20, hidden_size=8).save_pretrained(slm)
    record = {"weights_hash": weights_hash(slm)}
    manifest = {"models": {"slm": record}}
    calibration = write_labels(tmp_path / "calibration", manifest=manifest)
    test = write_labels(tmp_path / "test", seed=1, manifest=manifest)
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "shared_vocab": 20, "top_k": 5, "width": 8, "num_blocks": 1}
    router = TokenRouter(TokenRouterConfig(**shape, slm={"name": slm, **record}))
    router.save_pretrained(tmp_path / "router")
    common = {"router": str(tmp_path / "router"), "samples": 50}
    report = calibrate_verb(**common, dataset=calibration, target_recall=0.9, test=test, output_dir=tmp_path / "report")
    stored = TokenRouter.from_pretrained(tmp_path / "router")
    assert stored.config.calibration["achieved"]["recall"] >= 0.9
    assert report["threshold"]["threshold"] == stored.threshold and report["split"] == "train"
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    assert (tmp_path / "report" / "report.png").exists()
    alone = calibrate_verb(**common, test=str(test))  # the stored threshold
    assert alone == report
    stored.attach_embedding_of(slm)
    assert report_on(stored, RouterDataset(test, invalid=True), samples=50) == report

    with pytest.raises(ValueError, match="Give `dataset` with exactly one of target_rate"):
        calibrate_verb(**common, dataset=str(calibration))
    with pytest.raises(ValueError, match="There is nothing to do"):
        calibrate_verb(**common)
    with pytest.raises(ValueError, match="is no folder of a router"):
        calibrate_verb(router=slm + "x", test=str(test))
    other = str(tmp_path / "other")
    tiny_model(20, hidden_size=8, seed=1).save_pretrained(other)
    with pytest.raises(ValueError, match="The router was trained on another SLM than"):
        calibrate_verb(**common, test=str(test), slm=other)
    stored.config.slm = None
    stored.save_pretrained(tmp_path / "router")
    with pytest.raises(ValueError, match="no record of its SLM, whose embedding it reads: pass `slm`"):
        calibrate_verb(**common, test=str(test))
