"""Drawing the next token of every row of a batch at once, each row from its own random numbers.

Inverse-CDF sampling: with probabilities p over the vocabulary and one uniform number u in [0, 1), the token is the
first v with p_1 + … + p_v > u. u is a hash of (request seed, sample, step), not a draw from a shared generator: that
is what makes a request's tokens independent of the rows it happens to be batched with. The hash is the finaliser of
SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), applied once for each of the three numbers.

Top-k, min-p and the three penalties are those of vLLM, in its order: penalties on the logits, temperature, min-p,
top-k, top-p.
"""

from __future__ import annotations

import torch

# SplitMix64's increment and multipliers, as the signed numbers that torch.int64 wraps to.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)

GREEDY_BELOW = 1e-5  # a temperature under this is greedy, as in vLLM: logits divided by it would overflow


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift; torch's own repeats the sign bit."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = x + _INCREMENT
    x = (x ^ _shift(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift(x, 31)


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it: in float32 a cumulative sum over a large vocabulary loses its tail."""
    return torch.float32 if device.type == "mps" else torch.float64


def uniforms(seeds: torch.Tensor, samples: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """One number in [0, 1) a row from its seed, sample index and step, all int64 (B,) -> (B,).

    The largest value stays so far below 1 that `u * total` is below `total` after rounding, so that the search in
    `sample` never runs past the last token of positive probability.
    """
    bits = _mix(_mix(_mix(seeds) ^ samples) ^ steps)
    dtype = wide_dtype(seeds.device)
    keep = 52 if dtype is torch.float64 else 23
    return _shift(bits, 64 - keep).to(dtype) * 2.0**-keep


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy (N,) in nats of the distributions with these logits (N, V) float32: −Σ p log p = log Z − Σ p z.

    A banned id, whose logit is −inf, contributes nothing.
    """
    total = logits.logsumexp(dim=-1)
    # In place, since V may be 150 000. A banned id gives 0 · −inf = NaN; NaN among the logits still shows in `total`.
    return total - (logits - total[:, None]).exp_().mul_(logits).nan_to_num_(nan=0.0).sum(dim=-1)


class Penalties:
    """What one row has written, and what that does to its next token's logits.

    With p the prompt, c_v how often token v stands in the text so far, and the penalties r (repetition), f (frequency)
    and a (presence): z_v is divided by r where z_v > 0 and multiplied by it elsewhere, if v is in p or c_v > 0; then
    z_v − f · c_v − a · [c_v > 0]. Adding a token costs the same however long the text is.

    Args:
        prompt: (T,) int64, ids of the prompt.
        vocab: number of ids.
        repetition, presence, frequency: the penalties.
    """

    def __init__(
        self, prompt: torch.Tensor, vocab: int, *, repetition: float, presence: float, frequency: float
    ) -> None:
        self._repetition, self._presence, self._frequency = repetition, presence, frequency
        self._asked = torch.zeros(vocab, dtype=torch.bool, device=prompt.device)
        self._asked[prompt[prompt < vocab]] = True
        self._counts = torch.zeros(vocab, dtype=torch.float32, device=prompt.device)

    def add(self, token: int, times: int = 1) -> None:
        """The row has written `token`; −1 takes it back."""
        self._counts[token] += times

    def apply_(self, logits: torch.Tensor) -> None:
        """Change the row's `logits` (V,) float32 in place."""
        counts = self._counts.to(logits.device)
        seen = self._asked.to(logits.device) | (counts > 0)
        scaled = torch.where(logits > 0, logits / self._repetition, logits * self._repetition)
        logits.copy_(torch.where(seen, scaled, logits))
        logits.sub_(counts, alpha=self._frequency).sub_((counts > 0).float(), alpha=self._presence)


def sample(
    logits: torch.Tensor,
    u: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Next token of each row.

    Args:
        logits: (B, V) float32, -inf where a token is banned.
        u: (B,) uniform numbers in [0, 1).
        temperature: (B,), below `GREEDY_BELOW` for greedy rows.
        top_p: (B,) in (0, 1]; the smallest set of most probable tokens with at least this probability is kept, of those
            that top-k and min-p leave.
        top_k: (B,) int64, most probable tokens that are kept (and ties with the last), below 1 for all; None is all.
        min_p: (B,) in [0, 1], least share of the largest probability; None is 0.

    Returns:
        (B,) int64.
    """
    greedy = temperature < GREEDY_BELOW
    some_greedy, all_greedy, some_top_p = torch.stack([greedy.any(), greedy.all(), (top_p < 1).any()]).tolist()
    if all_greedy:
        return logits.argmax(-1)
    scaled = logits / temperature.masked_fill(greedy, 1.0)[:, None]
    # Masked before the softmax, which then shares out what is left. Rows that ask for neither keep their very bits.
    if min_p is not None:
        least = scaled.amax(-1, keepdim=True) + min_p.to(scaled.dtype).log()[:, None]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if top_k is not None and (most := int(top_k.max())) > 0:
        most = min(most, scaled.shape[1])
        last = scaled.topk(most).values.gather(1, (top_k.clamp(1, most) - 1)[:, None])
        scaled = scaled.masked_fill((scaled < last) & (top_k > 0)[:, None], -torch.inf)
    probs = scaled.softmax(-1)
    if some_top_p:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1, dtype=u.dtype) - ordered  # probability of the strictly likelier tokens
        whole = top_p >= 1
        dropped = (before >= top_p[:, None]) & ~whole[:, None]
        # Back to vocabulary order, so that a row draws the same token whether or not its neighbours use top_p.
        probs = torch.zeros_like(probs).scatter_(1, order, ordered.masked_fill_(dropped, 0.0))
    cdf = probs.cumsum(-1, dtype=u.dtype)
    target = (u * cdf[:, -1])[:, None]
    ids = torch.searchsorted(cdf, target, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
    return torch.where(greedy, logits.argmax(-1), ids) if some_greedy else ids
