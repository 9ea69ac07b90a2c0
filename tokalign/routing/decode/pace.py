"""How many routed rows the LLM should wait for, from the measured times of both models.

A pass over r rows takes about a + b r seconds, a for what is done once a pass (reading weights, launching kernels) and
b for each row. With B rows, a share p of the SLM's tokens routed and s tokens a span of the LLM, the LLM runs when k
rows wait and lets k/s of them go. Between two such passes the SLM makes (1/p) Σ 1/(B − w) passes, w = k − k/s … k − 1
rows waiting, and k tokens of the LLM go with k (1 − p)/(p s) of the SLM. All that is paid by the row is paid anyway, so
the time that can be saved is

    (a_slm Σ_w 1/(B − w) + p a_llm) / k     for each of the LLM's tokens,

large for small k (many passes of the LLM) and for large k (passes of the SLM over few rows). The best k minimises it.
"""

from __future__ import annotations

FORGET = 0.98  # what a measurement still weighs one measurement later
ENOUGH = 4.0  # weight of measurements of each model before the LLM waits at all


class _Line:
    """Least squares of seconds on rows that forgets: a + b r."""

    def __init__(self) -> None:
        self.weight = self._r = self._t = self._rr = self._rt = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        self.weight, self._r, self._t = FORGET * self.weight + 1, FORGET * self._r + rows, FORGET * self._t + seconds
        self._rr, self._rt = FORGET * self._rr + rows * rows, FORGET * self._rt + rows * seconds

    @property
    def fixed(self) -> float:
        """a, between 0 and the mean time. Where the passes had nearly equal rows all of it counts as fixed."""
        r, t = self._r / self.weight, self._t / self.weight
        # A ridge of a tenth of the mean: what the data do not say about b is taken as 0.
        b = (self._rt / self.weight - r * t) / (self._rr / self.weight - r * r + (0.1 * r) ** 2)
        return t - min(max(b, 0.0), t / r) * r


class Pace:
    """See the module. Until both models have been measured the LLM does not wait."""

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

    def llm(self, rows: int, seconds: float) -> None:
        """The LLM wrote a token of some rows."""
        self._lines[1].observe(rows, seconds)
        self._written += rows

    def rows(self, batch: int) -> int:
        """The best k for `batch` rows, from 1 to `batch`."""
        if batch not in self._best:
            self._best[batch] = self._of(batch)
        return self._best[batch]

    def _of(self, batch: int) -> int:
        slm, llm = self._lines
        if min(slm.weight, llm.weight) < ENOUGH or self._routed <= 0:
            return 1
        share, span = self._routed / self._asked, max(1.0, self._written / self._routed)
        passes = [0.0]  # Σ_{w < k} 1/(B − w)
        for waiting in range(batch):
            passes.append(passes[-1] + 1 / (batch - waiting))
        once = share * llm.fixed
        costs = [
            (slm.fixed * (passes[k] - passes[k - max(1, round(k / span))]) + once) / k for k in range(1, batch + 1)
        ]
        return 1 + costs.index(min(costs))
