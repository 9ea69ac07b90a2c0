"""The model card of a router: what it is for, when it routes, and how well it tells tokens apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tokalign.routing.router.model import TokenRouter


def write_model_card(
    router: TokenRouter,
    folder: str | Path,
    *,
    report: Mapping[str, Any] | None = None,
    dataset_name: str | None = None,
) -> Path:
    """Write `README.md` beside a router, in the hub's format.

    Args:
        folder: of the router; made if absent.
        report: of `tokalign.routing.router.metrics.router_report` on the test split.
        dataset_name: labels that it was trained on.

    Returns:
        The path of the card.
    """
    config = router.config
    slm = (config.slm or {}).get("name") or "unknown"
    on_hub = slm.count("/") == 1 and not slm.startswith((".", "/")) and not Path(slm).exists()
    data = ModelCardData(
        library_name="tokalign",
        tags=["tokalign", "token-routing"],
        base_model=slm if on_hub else None,
    )
    parameters = sum(parameter.numel() for parameter in router.parameters())
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        "# Token router",
        "",
        f"Scores each next token of `{slm}`: a token that scores at least the threshold goes to the large model "
        "(R2R, arXiv 2505.21600).",
        "",
        f"- architecture: {config.architecture}, {parameters:,} parameters, reads {', '.join(config.inputs)}",
        f"- small model's weights: `{(config.slm or {}).get('weights_hash')}`; another small model is refused",
    ]
    if dataset_name is not None:
        lines.append(f"- trained on the labels `{dataset_name}`")
    if config.threshold is None:
        lines.append("- threshold: none yet (`tokalign calibrate`)")
    else:
        lines.append(f"- threshold: {config.threshold:.6g}")
    if config.calibration is not None and "achieved" in config.calibration:
        target = ", ".join(f"{name} {value:g}" for name, value in config.calibration["target"].items())
        achieved = config.calibration["achieved"]
        lines.append(
            f"- calibrated on the split `{config.calibration.get('split')}` to {target}: LLM rate "
            f"{achieved['rate']:.3f}, recall {achieved['recall']:.3f}, responses without a missed token "
            f"{achieved['accuracy']:.3f} ({achieved['n_responses']:,} responses, {achieved['n_tokens']:,} tokens)"
        )
    if report is not None:
        lines += ["", "| test split | value | 95 % interval |", "|---|---|---|"]
        for key, label in (("auroc", "AUROC"), ("auprc", "AUPRC")):
            low, high = report[f"{key}_ci95"]
            lines.append(f"| {label} | {report[key]:.3f} | {low:.3f} – {high:.3f} |")
        for rate, entry in report["recall_at_rate"].items():
            low, high = entry["ci95"]
            lines.append(f"| recall at LLM rate {rate} | {entry['recall']:.3f} | {low:.3f} – {high:.3f} |")
        lines += ["", f"{report['responses']:,} responses, {report['tokens']:,} tokens."]
    lines += [
        "",
        "```python",
        "from tokalign.routing import RoutedGenerator",
        "",
        f'generator = RoutedGenerator.from_pretrained("{slm}", "<large model>", "<this router>")',
        "```",
    ]
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    ModelCard("\n".join(lines) + "\n").save(path)
    return path
