"""How many routed rows the LLM should wait for, from the measured times of both models.

A pass over n tokens takes about a + b n seconds: a is paid once a pass (reading weights, launching kernels), b for each
token. With B rows, a share p of the SLM's tokens routed and s tokens a span of the LLM, the LLM runs when k rows wait
and lets k/s of them go. Between two such passes the SLM makes (1/p) Σ 1/(B − w) passes, w = k − k/s … k − 1 rows
waiting, and k tokens of the LLM go with k (1 − p)/(p s) of the SLM. Both models read every token once, whatever k, so b
plays no part, and the time that can be saved is

    (a_slm Σ_w 1/(B − w) + p a_llm) / k     for each of the LLM's tokens,

large for small k (many passes of the LLM) and for large k (passes of the SLM over few rows). The best k minimises it.
"""

from __future__ import annotations

FORGET = 0.98  # what a measurement still weighs one measurement later
ENOUGH = 4.0  # weight of measurements of each model, from which on they are believed


class _Line:
    """Least squares of seconds on tokens, a + b n, that forgets."""

    def __init__(self) -> None:
        self.weight = self._n = self._t = self._nn = self._nt = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        self.weight, self._n, self._t = FORGET * self.weight + 1, FORGET * self._n + tokens, FORGET * self._t + seconds
        self._nn, self._nt = FORGET * self._nn + tokens * tokens, FORGET * self._nt + tokens * seconds

    @property
    def fixed(self) -> float:
        """a, between 0 and the mean time. Where the passes had nearly equally many tokens all of it counts as fixed."""
        n, t = self._n / self.weight, self._t / self.weight
        # A ridge of a thirtieth of the mean: what the data do not say about b is taken as 0.
        b = (self._nt / self.weight - n * t) / (self._nn / self.weight - n * n + (0.03 * n) ** 2)
        return t - min(max(b, 0.0), t / n) * n


class Pace:
    """See the module. Until both models have been measured a quarter of the rows wait, which is rarely far off."""

    def __init__(self) -> None:
        self._lines = (_Line(), _Line())
        self._asked = self._routed = self._written = 0.0
        self._best: dict[int, int] = {}  # by B; emptied now and then, so that it follows the measurements
        self._since = 0

    def slm(self, rows: int, routed: int, seconds: float) -> None:
        """The SLM was asked about some rows, of which some were routed."""
        self._lines[0].observe(rows, seconds)
        self._asked, self._routed = FORGET * self._asked + rows, FORGET * self._routed + routed
        self._written *= FORGET
        self._since += 1
        if self._since % 16 == 0:
            self._best.clear()

    def llm(self, rows: int, tokens: int, seconds: float) -> None:
        """The LLM wrote a token of some rows, for which it read so many."""
        self._lines[1].observe(tokens, seconds)
        self._written += rows

    def rows(self, batch: int) -> int:
        """The best k for `batch` rows, from 1 to `batch`."""
        if batch not in self._best:
            self._best[batch] = self._of(batch)
        return self._best[batch]

    def _of(self, batch: int) -> int:
        slm, llm = self._lines
        if min(slm.weight, llm.weight) < ENOUGH or self._routed <= 0:
            return max(1, batch // 4)
        share, span = self._routed / self._asked, max(1.0, self._written / self._routed)
        passes = [0.0]  # Σ_{w < k} 1/(B − w)
        for waiting in range(batch):
            passes.append(passes[-1] + 1 / (batch - waiting))
        once = share * llm.fixed
        costs = [
            (slm.fixed * (passes[k] - passes[k - max(1, round(k / span))]) + once) / k for k in range(1, batch + 1)
        ]
        return 1 + costs.index(min(costs))
