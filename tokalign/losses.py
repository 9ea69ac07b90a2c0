"""Losses of the methods as pure functions: tensors in, tensors out, torch and nothing else.

Each one is written from its paper's equation and is the specification of the trainer that carries the same name.
Shapes: B pairs, T positions; masks are 1 on completion tokens; log-ratios are ρ_t = log π(y_t|·) − log π_ref(y_t|·).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F


def critical_token_dpo_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_mask: torch.Tensor,
    rejected_mask: torch.Tensor,
    rejected_score: torch.Tensor | None,
    *,
    beta: float,
    aggregation: Literal["sequence", "position"] = "sequence",
    chosen_score: torch.Tensor | None = None,
) -> torch.Tensor:
    """Critical-token DPO (arXiv 2411.19943v3): a token of the rejected side counts by 1 − s_t.

    With `aggregation="sequence"`, the paper's equation (`beta` is its γ):

        ℓ = −log σ( β Σ_t ρ_t(y⁺) − β Σ_t (1 − s_t) ρ_t(y⁻) ).

    With `aggregation="position"`, what the released code computes: the logistic function is applied position by
    position, chosen position t against rejected position t, and the mean runs over *all* T positions:

        ℓ = (1/T) Σ_t −log σ( β ρ_t(y⁺) − β (1 − s_t) ρ_t(y⁻) ).

    There a position outside both completions (prompt, padding) has ρ = 0 on both sides and contributes log 2, so the
    loss and its gradient shrink as prompts and padding grow; this is the released behaviour, kept as it is.

    Args:
        chosen_logratios (`torch.Tensor` of shape `(B, T)`):
            ρ_t of the chosen sequences. Values where the mask is 0 are ignored.
        rejected_logratios (`torch.Tensor` of shape `(B, T)`):
            ρ_t of the rejected sequences; T may differ from the chosen side's for `"sequence"` only.
        chosen_mask (`torch.Tensor` of shape `(B, T)`):
            1 on the chosen completion tokens.
        rejected_mask (`torch.Tensor` of shape `(B, T)`):
            1 on the rejected completion tokens.
        rejected_score (`torch.Tensor` of shape `(B, T)`, *optional*):
            s_t in [0, 1] of the rejected tokens, low on critical ones. `None` weights every token 1 (plain DPO).
        beta (`float`):
            Strength of the implicit reward (γ in the paper's text: 1.0 there, 0.1 in the released configuration).
        aggregation (`"sequence"` or `"position"`, *optional*, defaults to `"sequence"`):
            See above.
        chosen_score (`torch.Tensor` of shape `(B, T)`, *optional*):
            s_t of the chosen tokens, to weight that side too; the paper does not.

    Returns:
        `torch.Tensor` of shape `(B,)`: the loss of each pair.

    Raises:
        ValueError: unknown aggregation, or sides of different length with `"position"`.
    """
    chosen = _weighted(chosen_logratios, chosen_mask, chosen_score)
    rejected = _weighted(rejected_logratios, rejected_mask, rejected_score)
    if aggregation == "sequence":
        return -F.logsigmoid(beta * (chosen.sum(dim=1) - rejected.sum(dim=1)))
    if aggregation == "position":
        if chosen.shape != rejected.shape:
            raise ValueError(
                "aggregation='position' compares chosen and rejected position by position and needs one length, got "
                f"{tuple(chosen.shape)} and {tuple(rejected.shape)}."
            )
        return -F.logsigmoid(beta * (chosen - rejected)).mean(dim=1)
    raise ValueError(f"aggregation must be 'sequence' or 'position', got {aggregation!r}.")


def _weighted(logratios: torch.Tensor, mask: torch.Tensor, score: torch.Tensor | None) -> torch.Tensor:
    logratios = logratios.masked_fill(mask == 0, 0.0)
    return logratios if score is None else (1.0 - score.masked_fill(mask == 0, 0.0)) * logratios
