"""What the tokens of a step were credited with, as a page for people (`credit_page_steps`).

Each prompt of the page has its whole group below it, since advantages compare the completions of a group. The heatmap
of token signals colours them by advantage, credit, entropy, log-probability or mask, and what the rewards said of a
completion stands above it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tokalign.stage.files import write_text_atomically

SHOWN = 32  # completions of a page, or one group: a page stays small enough to open, and the pass for it cheap


def write_credit_page(
    trainer: Any,
    inputs: Sequence[Mapping[str, Any]],
    batch: Mapping[str, Any],
    completion_ids: Sequence[Sequence[int]],
    credits: Mapping[str, torch.Tensor],
) -> None:
    """Write `output_dir/credit/step-<n>.html` of the main process's first groups; all processes call it together.

    Args:
        trainer: a `GRPOTrainer`.
        inputs: this process's rows of the dataset, one a completion.
        batch: their padded generation batch, with its advantages.
        completion_ids: the completions' own ids, without padding.
        credits: (B, T) of each credit function by its name, finite.
    """
    group = trainer.num_generations
    count = min(len(inputs), max(SHOWN // group, 1) * group)
    lengths = torch.tensor([len(ids) for ids in completion_ids])
    signals = {"advantage": batch["advantages"].view(len(inputs), -1).expand(batch["completion_ids"].shape)}
    signals |= {f"credit/{name}": values for name, values in credits.items()} | _measured(
        trainer, batch, lengths, count
    )
    signals["mask"] = batch["completion_mask"] * batch.get("tool_mask", 1)
    if not trainer.accelerator.is_main_process:
        return
    signals = {name: values[:count].float().cpu() for name, values in signals.items()}
    rows = []
    for first in range(0, count, group):
        prompt = batch["prompt_ids"][first][batch["prompt_mask"][first].bool()]
        row: dict[str, Any] = {"id": inputs[first].get("id", first), "prompt_ids": prompt.tolist()}
        row["answer"] = inputs[first].get("answer")
        for place in range(min(group, count - first)):
            index, side = first + place, f"completion {place + 1}"
            if length := int(lengths[index]):
                row[f"{side}_ids"] = list(completion_ids[index])
                row[f"{side}_notes"] = _notes(trainer, index, len(inputs))
                row |= {f"{side}_{name}": values[index, :length].tolist() for name, values in signals.items()}
        if any(lengths[first : first + group]):
            rows.append(row)
    if rows:
        folder = Path(str(trainer.args.output_dir)) / "credit"
        folder.mkdir(parents=True, exist_ok=True)
        step = trainer.state.global_step
        write_text_atomically(folder / f"step-{step}.html", _page(trainer, rows, list(signals), group, step))


def _page(trainer: Any, rows: list[dict[str, Any]], signals: list[str], group: int, step: int) -> str:
    from tokalign.view.heatmap import Scale, token_heatmap  # with its templates only where a page is due

    scales = {}
    for function, name in zip(trainer.credit_funcs, trainer.credit_func_names, strict=True):
        weighs = trainer._credit_mode(function) == "weight"
        meaning = "multiplies the advantage" if weighs else "is added to the advantage, times its coefficient"
        scales[f"credit/{name}"] = Scale(strong="high" if weighs else "both", meaning=meaning)
    scales["advantage"] = Scale(strong="both", meaning="below 0 the token becomes less likely, above 0 more")
    scales["mask"] = Scale(0.0, 1.0, "low", "not trained on: written by a tool, or cut off")
    return token_heatmap(
        rows,
        trainer._tokenizer,
        signals=signals,
        sides=[f"completion {place + 1}" for place in range(group)],
        title=f"Credit at step {step}",
        scales=scales,
    )


def _measured(trainer: Any, batch: Mapping[str, Any], lengths: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
    """Entropy and log-probability of the first completions under the policy as it is, (count, T) each.

    A pass of all processes, since sharded weights are gathered by all. Without dropout: it must draw no random number.
    """
    if "pixel_values" in batch:  # of some rows among many, which only TRL's own passes can tell apart
        return {}
    width = batch["completion_ids"].shape[1]
    written = (torch.arange(width)[None] < lengths[:count, None]).to(batch["prompt_mask"])
    training = trainer.model.training
    trainer.model.eval()
    with torch.no_grad():
        logprobs, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"][:count], batch["completion_ids"][:count]], dim=1),
            torch.cat([batch["prompt_mask"][:count], written], dim=1),
            width,
            batch_size=trainer.args.per_device_train_batch_size,
            compute_entropy=True,
        )
    trainer.model.train(training)
    return {"entropy": entropies, "logprob": logprobs}


def _notes(trainer: Any, index: int, rows: int) -> dict[str, str]:
    """What the rewards said of the main process's completion `index`, and what they logged of it beside."""
    every = rows * trainer.accelerator.num_processes
    notes = {}
    for name, values in [*trainer._logs["rewards"].items(), *trainer._logs["extra"].items()]:
        value = list(values)[-every:][index]
        if value is not None:
            notes[name] = f"{value:.3g}" if isinstance(value, float) else str(value)
    return notes
