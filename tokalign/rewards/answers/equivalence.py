"""Symbolic equality of two LaTeX expressions through math-verify, in a process that can be killed.

math-verify bounds its time with `signal.alarm`, which works in a main thread only, clobbers the caller's
alarm, and cannot interrupt one long big-integer operation inside C. Rewards are computed in trainer threads
and in data-loader processes, on text that a policy under optimisation chooses. So the library runs in one
child per process: its alarm is used there (always a main thread), the address space is limited there, and a
child that still does not answer is killed and replaced.

The child runs this very file (`python -P equivalence.py`), so that it needs neither an importable
caller nor a re-import of the caller's `__main__`; requests and replies are JSON lines.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
from typing import Any

ALARM_SECONDS = 2  # each library call inside the child
REPLY_SECONDS = 5.0  # then the child is killed; no reply means "not equal"
START_SECONDS = 120.0  # importing sympy on a loaded machine
MEMORY_BYTES = 4 << 30


class _Child:
    """The one child of this process; `ask` is safe to call from any thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, prediction: str, reference: str) -> bool:
        """Whether math-verify calls the two expressions equal; False when it fails or runs out of time."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            request = json.dumps([prediction, reference]) + "\n"
            try:
                self._pipe("stdin").write(request.encode())
                self._pipe("stdin").flush()
            except BrokenPipeError:  # died since the last reply (out of memory, killed by someone)
                self.close()
                return False
            reply = self._read_line(REPLY_SECONDS)
            if reply is None:
                self.close()
            return reply == b"true\n"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._pipe("stdin").close()
            self._pipe("stdout").close()
            self.process = None

    def _start(self) -> None:
        self.close()
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        if self._read_line(START_SECONDS) != b"ready\n":
            self.close()
            raise RuntimeError(
                "The math-verify process did not start (its message is above); is math-verify installed?"
            )

    def _pipe(self, name: str) -> Any:
        return getattr(self.process, name)

    def _read_line(self, seconds: float) -> bytes | None:
        """One reply (at most 6 bytes, written in one piece), or None after `seconds` or at end of file."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe("stdout"), selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        return os.read(self._pipe("stdout").fileno(), 64) or None


_child = _Child()
atexit.register(lambda: _child.close())


def _forget_parents_child() -> None:
    # After a fork two processes would share one pair of pipes and read each other's replies.
    global _child
    inherited, _child = _child.process, _Child()
    if inherited is not None and inherited.stdin is not None and inherited.stdout is not None:
        inherited.stdin.close()
        inherited.stdout.close()
        inherited.returncode = 0  # not ours to wait for


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parents_child)


def equivalent(prediction: str, reference: str) -> bool:
    """Whether two short LaTeX expressions are equal, within `REPLY_SECONDS` (plus one start of the child).

    The reference may be an equation that the prediction has to state too; running out of time or memory
    counts as unequal.
    """
    return _child.ask(prediction, reference)


def _serve() -> None:
    """The child: read `[prediction, reference]` lines from stdin, write `true` or `false` lines."""
    import logging
    import random
    import resource
    from functools import lru_cache

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)  # math-verify logs every timeout
    replies = os.dup(1)
    os.dup2(2, 1)  # nothing that a library prints may look like a reply

    import sympy
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    # Units, text and boxes were dealt with by the caller; the library's own heuristics for them would join
    # what differs.
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
    )
    extraction = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization)]

    @lru_cache(maxsize=4096)
    def expression(latex: str) -> Any:
        trees = parse(f"${latex}$", extraction, fallback_mode="no_fallback", parsing_timeout=ALARM_SECONDS)
        return timeout(ALARM_SECONDS)(complex_tree)(trees[0]) if trees else None

    def complex_tree(tree: Any) -> Any:
        # The library reads i as a variable, and gives a text with a lone i, as in "6 + 9 i", other symbols than "6+9i".
        names = {s: sympy.I if s.name == "i" else sympy.Symbol(s.name, real=True) for s in tree.free_symbols}
        names = {old: new for old, new in names.items() if old != new}
        return tree.xreplace(names) if names else tree

    @lru_cache(maxsize=4096)
    def sample(latex: str) -> Any:
        """Real and imaginary part at one fixed random point of its variables, or None where there is no such number."""
        tree = expression(latex)
        if not isinstance(tree, sympy.Expr):
            return None
        names = sorted(tree.free_symbols, key=str)
        point = {name: sympy.Rational(random.Random(str(name)).randint(10**6, 10**7), 10**6 + 3) for name in names}
        parts = tree.subs(point).doit().evalf(30).as_real_imag()
        return parts if all(part.is_Number and part.is_finite for part in parts) else None

    def differ_numerically(first: str, second: str) -> bool:
        # math-verify falls back on absolute tolerances (1e-20 π = 2e-20 π, √2 = 1.414214); a relative one
        # has to hold too. It also spares the many unequal pairs a call of `simplify`.
        a, b = sample(first), sample(second)
        if a is None or b is None:
            return False
        size = max(abs(part) for part in (*a, *b))
        return any(abs(x - y) > size * sympy.Float("1e-20") for x, y in zip(a, b, strict=True))

    def equal(prediction: str, reference: str) -> bool:
        predicted, expected = expression(prediction), expression(reference)
        if predicted is None or expected is None:
            return False
        if timeout(ALARM_SECONDS)(differ_numerically)(prediction, reference):
            return False
        return verify(expected, predicted, timeout_seconds=ALARM_SECONDS)

    os.write(replies, b"ready\n")  # one write each, whatever PYTHONUNBUFFERED says
    for line in sys.stdin:
        prediction, reference = json.loads(line)
        try:
            answer = equal(prediction, reference)
        # sympy raises any of these on text that is not mathematics; to the caller they mean "not shown equal"
        except (TimeoutException, ArithmeticError, AttributeError, LookupError, NotImplementedError):
            answer = False
        except (RecursionError, MemoryError, TypeError, ValueError):
            answer = False
        os.write(replies, b"true\n" if answer else b"false\n")


if __name__ == "__main__":
    _serve()
