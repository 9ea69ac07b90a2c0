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


def token_reward_regularizer(
    logps: torch.Tensor,
    mask: torch.Tensor,
    token_rewards: torch.Tensor,
    *,
    beta: float,
    reduction: str = "sum",
) -> torch.Tensor:
    """T-REG's regulariser of one side (arXiv 2412.02685): it raises tokens by their reward and lowers by it.

        L_reg(x, y) = − Σ_t β r̂_t log π(y_t|x, y_<t)

    Args:
        logps (`torch.Tensor` of shape `(B, T)`):
            log π of the tokens, in nats. Values where the mask is 0 are ignored.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 on completion tokens.
        token_rewards (`torch.Tensor` of shape `(B, T)`):
            r̂_t in [−0.5, 0.5]. No gradient should flow into them: detach rewards that the policy gave.
        beta (`float`):
            The base loss's β.
        reduction (`"sum"` or `"mean"`, *optional*, defaults to `"sum"`):
            `"mean"` divides by the number of completion tokens, as SimPO divides its sequence reward.

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Raises:
        ValueError: unknown reduction.
    """
    total = -beta * (token_rewards.masked_fill(mask == 0, 0.0) * logps.masked_fill(mask == 0, 0.0)).sum(dim=1)
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / mask.sum(dim=1).clamp(min=1)
    raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}.")


def sequence_rewards(
    logps: torch.Tensor, mask: torch.Tensor, ref_logps: torch.Tensor | None = None, *, beta: float
) -> torch.Tensor:
    """Implicit reward of whole completions: DPO's with a reference, SimPO's (arXiv 2405.14734) without.

        r_DPO(x, y) = β Σ_t ρ_t,        r_SimPO(x, y) = (β / |y|) Σ_t log π(y_t|x, y_<t)

    Args:
        logps (`torch.Tensor` of shape `(B, T)`):
            log π of the tokens. Values where the mask is 0 are ignored.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 on completion tokens.
        ref_logps (`torch.Tensor` of shape `(B, T)`, *optional*):
            log π_ref of the tokens; `None` gives SimPO's reward.
        beta (`float`):
            Scale of the reward.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    if ref_logps is None:
        return beta * logps.masked_fill(mask == 0, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return beta * (logps - ref_logps).masked_fill(mask == 0, 0.0).sum(dim=1)


def treg_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor | None,
    ref_rejected_logps: torch.Tensor | None,
    chosen_mask: torch.Tensor,
    rejected_mask: torch.Tensor,
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    *,
    beta: float,
    alpha: float,
    gamma: float = 0.0,
    sequence_weight: str = "gradient",
    reduction: str | None = None,
) -> torch.Tensor:
    """T-REG (arXiv 2412.02685): DPO or SimPO, regularised by token rewards on both sides.

        ℓ = −log σ( r(y_w) − r(y_l) − γ ) + α w ( L_reg(x, y_w) + L_reg(x, y_l) ),   w = σ( r(y_l) − r(y_w) + γ )

    r is the base loss's sequence reward (`sequence_rewards`) and L_reg `token_reward_regularizer`. w is the factor
    that the base loss's own gradient carries, so a pair that is already told apart is regularised less; it is a
    constant in the gradient.

    Args:
        chosen_logps, rejected_logps (`torch.Tensor` of shape `(B, T)`):
            log π of the tokens; T may differ between the sides.
        ref_chosen_logps, ref_rejected_logps (`torch.Tensor` of shape `(B, T)`, *optional*):
            log π_ref of the tokens (DPO); `None` on both sides gives SimPO.
        chosen_mask, rejected_mask (`torch.Tensor` of shape `(B, T)`):
            1 on completion tokens.
        chosen_rewards, rejected_rewards (`torch.Tensor` of shape `(B, T)`):
            r̂_t in [−0.5, 0.5].
        beta (`float`):
            β of the base loss and of the regulariser.
        alpha (`float`):
            Weight of the regulariser (paper: 0.1, 0.25 or 0.5); 0 gives the base loss.
        gamma (`float`, *optional*, defaults to `0.0`):
            SimPO's target reward margin.
        sequence_weight (`"gradient"` or `"static"`, *optional*, defaults to `"gradient"`):
            `"static"` is the paper's ablation w = 1.
        reduction (`"sum"` or `"mean"`, *optional*):
            Of the regulariser; defaults to the base loss's own: `"sum"` for DPO, `"mean"` for SimPO.

    Returns:
        `torch.Tensor` of shape `(B,)`: the loss of each pair.

    Raises:
        ValueError: unknown `sequence_weight` or `reduction`, or a reference on one side only.
    """
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        raise ValueError("Give reference log-probs for both sides (DPO) or for neither (SimPO).")
    chosen = sequence_rewards(chosen_logps, chosen_mask, ref_chosen_logps, beta=beta)
    rejected = sequence_rewards(rejected_logps, rejected_mask, ref_rejected_logps, beta=beta)
    margin = chosen - rejected - gamma
    reduction = reduction or ("mean" if ref_chosen_logps is None else "sum")
    regularizer = token_reward_regularizer(
        chosen_logps, chosen_mask, chosen_rewards, beta=beta, reduction=reduction
    ) + token_reward_regularizer(rejected_logps, rejected_mask, rejected_rewards, beta=beta, reduction=reduction)
    return -F.logsigmoid(margin) + alpha * pair_weight(margin, sequence_weight) * regularizer


def pair_weight(margin: torch.Tensor, sequence_weight: str) -> torch.Tensor:
    """T-REG's w of each pair from its reward margin r(y_w) − r(y_l) − γ, (B,) -> (B,), without a gradient."""
    if sequence_weight == "gradient":
        return torch.sigmoid(-margin.detach())
    if sequence_weight == "static":
        return torch.ones_like(margin)
    raise ValueError(f"sequence_weight must be 'gradient' or 'static', got {sequence_weight!r}.")
