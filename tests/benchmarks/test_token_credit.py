"""Agreement by kind of token: the candidates are those up to the first error, and of one kind."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.experiments.token_credit import EARLY, by_kind, kind_of


def test_a_first_error_is_looked_for_among_the_tokens_of_its_kind():
    words = ["Anna", ":", "7", "+", "5", "=", "13", "\n", "12", "Now"]
    kinds = [kind_of(word) for word in words]
    assert kinds == ["names", *["signs", "numbers"] * 3, "signs", "numbers", "words"]
    ids = [[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2]]
    # the "=" is the most suspicious before the error, and what follows the error more so
    low = [np.array([0.9, 0.9, 0.9, 0.9, 0.8, 0.1, 0.2, 0.0, 0.0]), np.array([0.5, 0.4, 0.1])]
    scores = {"low": low, "random": [np.zeros(len(row)) for row in ids]}
    reports = by_kind(scores, [6, -1], ids, kinds)
    assert set(reports) == {EARLY, "numbers"}  # no error is of another kind
    assert reports[EARLY]["signals"]["low"]["auroc"] == pytest.approx(5 / 6)
    assert (reports["numbers"]["tokens"], reports["numbers"]["signals"]["low"]["auroc"]) == (3, 1.0)
    assert reports["numbers"]["signals"]["low"]["hit1"] == 1.0
