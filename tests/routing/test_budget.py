"""The budget controller in simulation: scores drift away from the calibration data, the served rate does not."""

import numpy as np
import pytest

from tokalign.routing.serve.budget import BudgetController


def logits_of(shift, scale=2.5, size=200_000, seed=0):
    """Router scores in logit space: most tokens safe, a shoulder of hard ones."""
    random = np.random.default_rng(seed)
    hard = random.random(size) < 0.15
    return np.where(hard, random.normal(1.5, scale, size), random.normal(-3.0, scale, size)) + shift


def calibrate(target):
    scores = np.sort(logits_of(0.0, seed=7))
    return 1 / (1 + np.exp(-scores[int((1 - target) * len(scores))]))


def serve(controller, logits, chunk=1):
    """Route tokens at the controller's threshold; which of them the LLM wrote, and the thresholds used."""
    scores = 1 / (1 + np.exp(-logits))
    routed, thresholds = np.zeros(len(scores), bool), []
    for a in range(0, len(scores), chunk):
        routed[a : a + chunk] = scores[a : a + chunk] >= controller.threshold
        controller.observe(int(routed[a : a + chunk].sum()), len(scores[a : a + chunk]))
        thresholds.append(controller.threshold)
    return routed, thresholds


@pytest.mark.parametrize("target", [0.05, 0.12, 0.3])
@pytest.mark.parametrize("shift", [-1.5, 1.5])
def test_a_shifted_distribution_is_brought_back_to_the_target(target, shift):
    logits = logits_of(shift)
    threshold = calibrate(target)
    fixed = (1 / (1 + np.exp(-logits)) >= threshold)[-100_000:].mean()
    assert abs(fixed - target) > 0.015  # without control the budget is missed
    routed, _ = serve(BudgetController(target, threshold), logits)
    assert abs(routed[-100_000:].mean() - target) < 0.01
    quarters = routed[-100_000:].reshape(4, -1).mean(1)  # and it stays there
    assert np.abs(quarters - target).max() < 0.01


def test_without_drift_the_threshold_stays_near_the_calibrated_one():
    routed, thresholds = serve(BudgetController(0.12, calibrate(0.12)), logits_of(0.0))
    assert abs(routed.mean() - 0.12) < 0.01
    z = np.log(np.array(thresholds) / (1 - np.array(thresholds)))
    z0 = np.log(calibrate(0.12) / (1 - calibrate(0.12)))
    assert np.abs(z - z0).max() < 0.5


def test_the_same_observations_give_the_same_thresholds():
    logits = logits_of(1.5, size=20_000)
    runs = [serve(BudgetController(0.12, 0.5), logits, chunk=8) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    assert len(set(runs[0][1])) > 5


def test_moves_are_reported_when_the_threshold_changes_and_only_then():
    controller = BudgetController(0.1, 0.5, window=100)
    before = controller.threshold
    for _ in range(300):
        moved = controller.observe(1, 2)
        assert moved == (controller.threshold != before)
        before = controller.threshold
    assert before > 0.5


def test_the_deadband_rests_and_the_bound_holds():
    controller = BudgetController(0.5, 0.5, window=100, deadband=0.01)
    assert not any(controller.observe(1, 2) for _ in range(1000))
    assert controller.threshold == 0.5 and not controller.observe(0, 0)
    for _ in range(10_000):  # a rate that no threshold can lower
        controller.observe(10, 10)
    assert controller.rate == pytest.approx(1.0)
    assert controller.threshold == pytest.approx(1 / (1 + np.exp(-4.0)), abs=1e-3)
    for _ in range(100):  # the integral did not wind up: it comes back at once
        controller.observe(0, 10)
    assert controller.threshold < 0.97


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0.0, 0.5), {}, r"^target_rate is 0.0: use a share"),
        ((1.0, 0.5), {}, r"^target_rate is 1.0"),
        ((0.1, 1.5), {}, r"^The threshold is 1.5: a budget can only steer one between 0 and 1"),
        ((0.1, 0.0), {}, r"^The threshold is 0.0"),
        ((0.1, 0.5), {"window": 0}, "must be above 0"),
        ((0.1, 0.5), {"gain": 0.0}, "must be above 0"),
    ],
)
def test_numbers_out_of_range(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        BudgetController(*arguments, **options)


def test_more_llm_tokens_than_tokens():
    with pytest.raises(ValueError, match="cannot have written more"):
        BudgetController(0.1, 0.5).observe(3, 2)
