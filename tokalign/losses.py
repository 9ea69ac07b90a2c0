"""The parts of the methods' losses that TRL does not compute, as pure functions: tensors in, tensors out.

Each one is written from its paper's equation, and a trainer calls it. What TRL does compute (critical-token DPO's sum
over positions, T-REG's base loss against a reference) is held to the paper's equation by the plain loops of
tests/trainers/. Shapes: B pairs (completions in GRPO's), T positions; masks are 1 on completion tokens; log-ratios
are ρ_t = log π(y_t|·) − log π_ref(y_t|·).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def critical_token_dpo_position_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_mask: torch.Tensor,
    rejected_mask: torch.Tensor,
    chosen_weights: torch.Tensor,
    rejected_weights: torch.Tensor,
    *,
    beta: float,
) -> torch.Tensor:
    """Critical-token DPO (arXiv 2411.19943v3) as its released code computes it, position by position.

    Chosen position t is compared with rejected position t, and the mean runs over *all* T positions:

        ℓ = (1/T) Σ_t −log σ( β w_t ρ_t(y⁺) − β w_t ρ_t(y⁻) )

    Its weights are w_t = 1 − s_t of the rejected tokens, 1 of the end token, and on the chosen side 1, or s_t where
    both sides are weighted. A position outside both completions (prompt, padding) has ρ = 0 on both sides and
    contributes log 2, so the loss and its gradient shrink as prompts and padding grow; this is the released behaviour,
    kept as it is.

    Args:
        chosen_logratios, rejected_logratios (`torch.Tensor` of shape `(B, T)`):
            ρ_t of the sequences. Values where the mask is 0 are ignored.
        chosen_mask, rejected_mask (`torch.Tensor` of shape `(B, T)`):
            1 on completion tokens.
        chosen_weights, rejected_weights (`torch.Tensor` of shape `(B, T)`):
            w_t in [0, 1]; ones give what the released code makes of plain DPO.
        beta (`float`):
            Strength of the implicit reward (γ in the paper's text: 1.0 there, 0.1 in the released configuration).

    Returns:
        `torch.Tensor` of shape `(B,)`: the loss of each pair.
    """
    # Both factors are masked: a product with a NaN outside the completion would have a gradient of NaN
    chosen, rejected = (
        weights.masked_fill(mask == 0, 0.0) * logratios.masked_fill(mask == 0, 0.0)
        for weights, logratios, mask in (
            (chosen_weights, chosen_logratios, chosen_mask),
            (rejected_weights, rejected_logratios, rejected_mask),
        )
    )
    return -F.logsigmoid(beta * (chosen - rejected)).mean(dim=1)


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


def pair_weight(margin: torch.Tensor, sequence_weight: str) -> torch.Tensor:
    """T-REG's weight of a pair, from its reward margin m = r(y_w) − r(y_l) − γ, (B,) -> (B,), without a gradient.

    `"gradient"` is the paper's w = σ(−m), the factor that the base loss's own gradient carries: a pair that is already
    told apart is regularised less. `"static"` is its ablation w = 1.

    Raises:
        ValueError: unknown `sequence_weight`.
    """
    if sequence_weight == "gradient":
        return torch.sigmoid(-margin.detach())
    if sequence_weight == "static":
        return torch.ones_like(margin)
    raise ValueError(f"sequence_weight must be 'gradient' or 'static', got {sequence_weight!r}.")


def wpo_weights(logps: torch.Tensor, log_sum_sq_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """WPO's weight of a pair (arXiv 2406.11827, Eq. 2), as TRL multiplies it into the base loss; no gradient.

    How likely the policy itself would write both completions, by token and against its own spread:

        w(x, y) = exp( (1/|y|) Σ_t ( log π(y_t) − log Σ_v π(v)² ) ),     and a pair's is w(x, y_w) · w(x, y_l)

    Args:
        logps (`torch.Tensor` of shape `(2B, T)`):
            log π of the tokens, the chosen half first. Values where the mask is 0 are ignored.
        log_sum_sq_probs (`torch.Tensor` of shape `(2B, T)`):
            log Σ_v π(v)² at the same positions.
        mask (`torch.Tensor` of shape `(2B, T)`):
            1 on completion tokens.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    aligned = (logps - log_sum_sq_probs).detach().masked_fill(mask == 0, 0.0)
    chosen, rejected = (aligned.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).exp().chunk(2)
    return chosen * rejected


def token_advantages(
    advantages: torch.Tensor,
    mask: torch.Tensor,
    weights: Sequence[torch.Tensor] = (),
    bonuses: Sequence[tuple[float, torch.Tensor]] = (),
) -> torch.Tensor:
    """Advantages of tokens, from those of completions and from what credit functions say of the tokens.

        A_it = A_i Π_w w_it + Σ_a λ_a c^a_it

    Where a credit function says nothing (NaN) its w is 1 and its c is 0, so that the token keeps A_i.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`):
            A_i of the completions.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 on the tokens that the policy wrote; the others (padding, results of tools) get 0.
        weights (sequence of `torch.Tensor` of shape `(B, T)`):
            w of each credit function that weighs.
        bonuses (sequence of `(float, torch.Tensor of shape (B, T))`):
            λ and c of each credit function that adds an advantage of its own.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    result = advantages.unsqueeze(1).expand(mask.shape)
    for weight in weights:
        result = result * torch.nan_to_num(weight, nan=1.0)
    for coefficient, credit in bonuses:
        result = result + coefficient * torch.nan_to_num(credit, nan=0.0)
    return result.masked_fill(mask == 0, 0.0)


def group_advantages(
    rewards: torch.Tensor, weights: torch.Tensor, *, group_size: int, scale_rewards: str, aggregation: str
) -> torch.Tensor:
    """GRPO's advantages (arXiv 2402.03300) of some reward functions, computed as TRL computes those of all.

        sum_then_normalize:  A_i = (R_i − mean_G R) / (std R + ε),  R_i = Σ_k w_k R_ik
        normalize_then_sum:  A_i = (S_i − mean S) / (std S + ε),    S_i = Σ_k w_k (R_ik − mean_G R_k) / (std_G R_k + ε)

    (the second is GDPO, arXiv 2601.05242). The standard deviation of R is the group's or the batch's, or the quotient
    is left out, as `scale_rewards` says. ε = 1e-4; NaN means that a function does not judge a completion.

    Args:
        rewards (`torch.Tensor` of shape `(N, K)`):
            R_ik of all processes' completions, a group's next to each other, by K reward functions. K may be 0.
        weights (`torch.Tensor` of shape `(K,)`):
            w_k.
        group_size (`int`):
            Completions of a prompt; it divides N.
        scale_rewards (`"group"`, `"batch"` or `"none"`), aggregation (`"sum_then_normalize"` or
            `"normalize_then_sum"`): TRL's arguments of these names.

    Returns:
        `torch.Tensor` of shape `(N,)`; 0 for a completion that no function judges.

    Raises:
        ValueError: unknown `scale_rewards` or `aggregation`.
    """
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards must be 'group', 'batch' or 'none', got {scale_rewards!r}.")
    if aggregation not in ("sum_then_normalize", "normalize_then_sum"):
        raise ValueError(f"aggregation must be 'sum_then_normalize' or 'normalize_then_sum', got {aggregation!r}.")
    unjudged = rewards.isnan().all(dim=1)
    if aggregation == "normalize_then_sum":
        grouped = rewards.view(len(rewards) // group_size, group_size, rewards.size(1))
        normal = (grouped - grouped.nanmean(dim=1, keepdim=True)) / (_nanstd(grouped, dim=1) + 1e-4)
        rewards, group_size, scale_rewards = normal.view(rewards.shape), len(rewards), "batch"
    totals = (rewards * weights).nansum(dim=1).masked_fill(unjudged, torch.nan)
    groups = totals.view(-1, group_size)
    advantages = groups - groups.nanmean(dim=1, keepdim=True)
    if scale_rewards != "none":
        advantages = advantages / (_nanstd(groups if scale_rewards == "group" else totals.view(1, -1), dim=1) + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0).flatten()


def _nanstd(values: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Sample standard deviation of what is not NaN, the dimension kept; NaN where there are fewer than two values."""
    variance = ((values - values.nanmean(dim=dim, keepdim=True)) ** 2).nanmean(dim=dim, keepdim=True)
    count = (~values.isnan()).sum(dim=dim, keepdim=True)
    return (variance * torch.where(count > 1, count / (count - 1), torch.nan)).sqrt()
