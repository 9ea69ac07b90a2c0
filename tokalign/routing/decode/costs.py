"""What a routed completion costs: the paper's activated parameters, all arithmetic, all reads of weights."""

from __future__ import annotations

from tokalign.routing.decode.backend import RoutedStats


def activated_parameters(stats: RoutedStats, p_slm: float, p_llm: float) -> float:
    """Average activated parameters a token, (n_slm·P_slm + n_llm·P_llm) / n_out (R2R, arXiv 2505.21600, section 5).

    A token counts for the model that wrote it: the SLM's work on routed positions, prefill and the router are free.

    Args:
        p_slm, p_llm: parameters of the models, in any unit; the result has the same.

    Raises:
        ValueError: no token was written.
    """
    return (stats.slm_tokens * p_slm + stats.llm_tokens * p_llm) / _tokens(stats)


def full_cost(stats: RoutedStats, p_slm: float, p_llm: float, p_router: float = 0.0) -> float:
    """Parameters × positions of everything that ran, per written token.

    (positions_slm·P_slm + positions_llm·P_llm + decisions·P_router) / n_out. Positions include both prompts, the SLM's
    on routed tokens and those that the LLM only reads to catch up. The router decides once for every token that the
    SLM keeps (where the LLM verifies: that it drafts) and once for every hand-off.

    Args:
        p_slm, p_llm, p_router: parameters, in one unit; the result has the same.

    Raises:
        ValueError: no token was written.
    """
    decisions = (stats.drafted or stats.slm_tokens) + stats.handoffs
    work = stats.slm_positions * p_slm + stats.llm_positions * p_llm + decisions * p_router
    return work / _tokens(stats)


def weight_reads(stats: RoutedStats, p_slm: float, p_llm: float, p_router: float = 0.0) -> float:
    """Parameters that are read from memory for each written token, if every forward pass serves one row.

    (passes_slm·P_slm + passes_llm·P_llm + decisions·P_router) / n_out. It is the cost at batch 1 of a model whose step
    waits for its weights, where `full_cost` is the cost of one whose step is arithmetic: a pass over many tokens counts
    once here, and a prompt as one pass. Where the LLM verifies, a pass is a look at a draft.

    Args:
        p_slm, p_llm, p_router: parameters, in one unit; the result has the same.

    Raises:
        ValueError: no token was written.
    """
    decisions = (stats.drafted or stats.slm_tokens) + stats.handoffs
    passes = stats.handoffs if stats.drafted else stats.llm_tokens
    return (decisions * (p_slm + p_router) + passes * p_llm) / _tokens(stats)


def _tokens(stats: RoutedStats) -> int:
    if not stats.tokens:
        raise ValueError("No token was written, so there is no cost per token: generate something first.")
    return stats.tokens
