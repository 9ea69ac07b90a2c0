"""The threshold of a router, chosen on held-out responses for a budget and stored in the router's config.

    route  ⇔  score >= threshold

Three targets, of which exactly one is given: the LLM rate (largest share of tokens that may be routed), the recall
(smallest share of divergent tokens that must be), or the accuracy. Accuracy here is the share of held-out responses
all of whose divergent tokens are routed: such a response loses nothing that the labels can see. It is no measurement of
answers; that needs the pair to decode (`tokalign generate`).

The rate is measured on the large model's own responses. Routed decoding visits other prefixes, so its rate may differ:
label a second round on policy, or let the server's budget controller track the rate.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from tokalign.routing.labels.classes import DIVERGENT
from tokalign.routing.router.features import RouterDataset
from tokalign.routing.router.metrics import check_tokens, plot_reports, router_report
from tokalign.routing.router.model import TokenRouter
from tokalign.stage.files import write_json_atomically
from tokalign.stage.manifest import MANIFEST
from tokalign.statistics import percentile_interval

logger = logging.getLogger(__name__)

_CELLS = 1 << 20  # resampled counts held at a time


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it does on the responses it was measured on.

    Attributes:
        threshold: route if and only if score >= threshold.
        rate: share of all tokens that are routed.
        recall: share of the divergent tokens that are routed; 1 where there are none.
        accuracy: share of the responses all of whose divergent tokens are routed.
        n_tokens, n_responses: how many were measured.
        ci: 95 % intervals of rate, recall and accuracy at this threshold, by a bootstrap over responses.
    """

    threshold: float
    rate: float
    recall: float
    accuracy: float
    n_tokens: int
    n_responses: int
    ci: dict[str, list[float]]


def calibrate(
    scores: np.ndarray,
    labels: np.ndarray,
    response_index: np.ndarray,
    *,
    target_rate: float | None = None,
    target_recall: float | None = None,
    target_accuracy: float | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> Calibration:
    """The threshold that meets one target: the lowest for a rate, the highest for a recall or an accuracy.

    Tokens of equal score are routed together, so the rate never exceeds its target, and recall and accuracy never fall
    below theirs. Between two scores the threshold lies half-way, so that a rounding error of another engine does not
    change a decision.

    Args:
        scores: (N,), in [0, 1].
        labels: (N,) 0 identical, 1 neutral, 2 divergent, −1 no verdict (counts in the rate only).
        response_index: (N,) which response a token belongs to.
        samples: bootstrap resamples of responses.

    Raises:
        ValueError: not exactly one target, a target out of range or out of reach, or no divergent token to recall.
    """
    targets = {"rate": target_rate, "recall": target_recall, "accuracy": target_accuracy}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"Give exactly one of target_rate, target_recall and target_accuracy, not {len(given)}: the others follow."
        )
    ((kind, target),) = given.items()
    if not 0 < target <= 1:
        raise ValueError(f"target_{kind} is {target}: use a share above 0 and up to 1.")
    scores, labels, response_index = check_tokens(scores, labels, response_index)
    divergent = labels == DIVERGENT
    if kind != "rate" and not divergent.any():
        raise ValueError(f"There is no divergent token to reach target_{kind} on; label more problems.")
    # Tokens of one score are routed together, so a threshold is a choice among the distinct scores, the levels
    levels, counts = np.unique(scores, return_counts=True)
    if kind == "rate":
        routed = np.cumsum(counts[::-1])[::-1]  # tokens that score at least each level
        allowed = np.flatnonzero(routed <= np.floor(target * len(scores) + 1e-9))
        if not len(allowed):
            raise ValueError(
                f"target_rate {target} is out of reach: the {routed[-1]} highest of {len(scores)} tokens score alike "
                f"and are routed together, so the lowest rate is {routed[-1] / len(scores):.3g}."
            )
        chosen = int(allowed[0])
    else:
        # What must be routed: the divergent tokens, or of each response the one that scores lowest
        needed = scores[divergent]
        total = len(needed)
        if kind == "accuracy":
            needed = _lowest(scores[divergent], response_index[divergent])
            total = len(np.unique(response_index))
        free = total - len(needed)  # responses without a divergent token
        count = int(np.ceil(target * total - 1e-9)) - free
        if count <= 0:
            raise ValueError(
                f"target_accuracy {target} is met without the LLM: {free} of {total} responses have no divergent "
                "token; ask for more, or use the SLM alone."
            )
        # The `count` highest of what must be routed; the threshold is at the lowest of these
        chosen = int(np.searchsorted(levels, np.sort(needed)[-count]))
    return measure(scores, labels, response_index, _between(levels, chosen), samples=samples, seed=seed)


def measure(
    scores: np.ndarray,
    labels: np.ndarray,
    response_index: np.ndarray,
    threshold: float,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> Calibration:
    """What a given threshold does; arguments as in `calibrate`."""
    scores, labels, response_index = check_tokens(scores, labels, response_index)
    # Numerators and denominators of the three shares, by response: a resample of responses is a weighted sum of these
    routed, divergent = scores >= threshold, labels == DIVERGENT
    _, response = np.unique(response_index, return_inverse=True)
    count = int(response.max()) + 1

    def per_response(which: np.ndarray) -> np.ndarray:
        return np.bincount(response, weights=which, minlength=count)

    tokens, sent = per_response(np.ones(len(scores))), per_response(routed)
    wanted, recalled = per_response(divergent), per_response(divergent & routed)
    columns = np.stack([sent, tokens, recalled, wanted, recalled == wanted, np.ones(count)], axis=1)  # (R, 6)

    def shares(sums: np.ndarray) -> np.ndarray:
        ratios = sums[..., ::2] / np.maximum(sums[..., 1::2], 1)
        ratios[..., 1] = np.where(sums[..., 3] > 0, ratios[..., 1], 1.0)
        return ratios

    rate, recall, accuracy = shares(columns.sum(axis=0)).tolist()
    generator = np.random.default_rng(seed)
    # How often each response is drawn, as many resamples at a time as memory holds
    rows = max(1, _CELLS // count)
    drawn = [
        shares(generator.multinomial(count, np.full(count, 1 / count), size=min(rows, samples - start)) @ columns)
        for start in range(0, samples, rows)
    ]
    spread = np.concatenate(drawn)
    return Calibration(
        threshold=threshold,
        rate=rate,
        recall=recall,
        accuracy=accuracy,
        n_tokens=len(scores),
        n_responses=count,
        ci={name: list(percentile_interval(spread[:, i])) for i, name in enumerate(("rate", "recall", "accuracy"))},
    )


def score_dataset(router: TokenRouter, dataset: RouterDataset, *, batch_size: int = 4096) -> np.ndarray:
    """The router's score (N,) float32 of every item of `dataset`, in order; features are read a batch at a time."""
    check_dataset(router, dataset)
    device = next(router.parameters()).device
    training = router.training
    router.eval()
    scores = np.empty(len(dataset), dtype=np.float32)
    with torch.no_grad():
        for start in range(0, len(dataset), batch_size):
            items = range(start, min(start + batch_size, len(dataset)))
            batch = {name: tensor.to(device) for name, tensor in dataset.__getitems__(items).items()}
            logits = cast(torch.Tensor, router(**router_inputs(router, batch)).logits)
            scores[start : items.stop] = logits.float().sigmoid().cpu().numpy()
    router.train(training)
    return scores


def router_inputs(router: TokenRouter, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `forward` reads of a batch of `RouterDataset` on the router's device, without the labels."""
    names = {"hidden": "hidden", "logits": "top_logits", "entropy": "entropy"}
    inputs = {names[name]: batch[names[name]] for name in router.config.inputs if name != "token"}
    if "token" in router.config.inputs:
        inputs["token_embedding"] = router.token_embedding(batch["predicted"])
    return inputs


def check_dataset(router: TokenRouter, dataset: RouterDataset) -> None:
    """Refuse features of another shape, or of another SLM, than the router's.

    Raises:
        ValueError: in one sentence.
    """
    for name, own, theirs in (
        ("hidden size", router.config.hidden_size, dataset.hidden_size),
        ("number of top logits", router.config.top_k, dataset.top_k),
    ):
        if own != theirs:
            raise ValueError(
                f"The features of {dataset.folder} have {name} {theirs}, but the router was made for {own}; use labels "
                "of its SLM."
            )
    trained = (router.config.slm or {}).get("weights_hash")
    theirs = dataset.manifest.get("models", {}).get("slm", {}).get("weights_hash")
    if trained is not None and theirs is not None and trained != theirs:
        raise ValueError(
            f"The features of {dataset.folder} are of another SLM (weights {theirs[:12]}) than the router's "
            f"({trained[:12]}); use labels of its SLM."
        )
    if "token" in router.config.inputs and not router.has_embedding:
        raise ValueError("The router has no embedding of its SLM: call router.attach_embedding_of(slm) first.")


def calibrate_router(
    router: TokenRouter,
    stage: RouterDataset | str | Path,
    *,
    output_dir: str | Path | None = None,
    batch_size: int = 4096,
    **target: Any,
) -> Calibration:
    """Choose the router's threshold on a stage and store it in `router.config`.

    Args:
        router: with its SLM's embedding attached, if it reads the predicted token.
        stage: held-out labels, e.g. runs/labels/labels/calibration. As a dataset it should be made with
            `invalid=True`.
        output_dir: the router's folder, if its `config.json` is to be written; the weights are left as they are.
        target: one of `target_rate`, `target_recall`, `target_accuracy`, and other arguments of `calibrate`.
    """
    dataset = stage if isinstance(stage, RouterDataset) else RouterDataset(stage, invalid=True)
    scores = score_dataset(router, dataset, batch_size=batch_size)
    result = calibrate(scores, dataset.labels, dataset.responses, **target)
    before = router.config.threshold
    if before is not None and before != result.threshold:
        logger.warning("The router's threshold was %g and is now %g.", before, result.threshold)
    router.config.threshold = result.threshold
    router.config.calibration = {
        "target": {name: value for name, value in target.items() if name.startswith("target_") and value is not None},
        "achieved": {name: value for name, value in asdict(result).items() if name != "threshold"},
        "split": dataset.folder.name,
        "labels": hashlib.sha256((dataset.folder / MANIFEST).read_bytes()).hexdigest(),
    }
    if output_dir is not None:
        router.config.save_pretrained(output_dir)
    return result


def report_on(
    router: TokenRouter,
    dataset: RouterDataset,
    folder: str | Path | None = None,
    *,
    batch_size: int = 4096,
    samples: int = 1000,
) -> dict[str, Any]:
    """`router_report` of a router on a split, and what its threshold does there (`threshold`), if it has one.

    Args:
        folder: gets report.json and report.png; None writes nothing.
    """
    scores = score_dataset(router, dataset, batch_size=batch_size)
    tokens = scores, dataset.labels, dataset.responses
    report = router_report(*tokens, pos_weight=router.config.pos_weight, samples=samples)
    if router.config.threshold is not None:
        report["threshold"] = asdict(measure(*tokens, router.threshold, samples=samples))
    report["split"] = dataset.folder.name
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json_atomically(Path(folder) / "report.json", report)
        plot_reports({router.config.architecture: report}, Path(folder) / "report.png")
    return report


def _lowest(scores: np.ndarray, responses: np.ndarray) -> np.ndarray:
    """The lowest score of each response."""
    order = np.lexsort((scores, responses))
    first = np.r_[True, responses[order][1:] != responses[order][:-1]]
    return scores[order][first]


def _between(levels: np.ndarray, chosen: int) -> float:
    """A threshold that routes the levels from `chosen` on; representable in fp32, where decoders compare."""
    if chosen == 0:
        return 0.0
    half_way = float(np.float32((levels[chosen - 1] + levels[chosen]) / 2))
    return half_way if levels[chosen - 1] < half_way <= levels[chosen] else float(levels[chosen])
