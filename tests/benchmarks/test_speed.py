"""benchmarks/speed.py: one part run for real at the smallest size, exponents against a plain fit, and the page."""

from __future__ import annotations

import json
import math

import pytest
import speed
import speed_ratios
from growth import curve, power_law
from pages import speed as page_module


def routed_result(**changes) -> dict:
    """What routed_decoding.py writes for one batch size."""
    found = {
        "batch": 1,
        "llm_rate": 0.12,
        "tokens_per_second": {"SLM only": 10.0, "routed": 5.0, "LLM only": 2.0},
        "ideal_seconds": 9.0,
        "step_ratio": 6.7,
        "share_of_ideal": 0.9,
        "speedup_over_llm_only": 2.5,
    }
    arguments = {"pair": ["0.5b", "3b"], "new_tokens": 50, "repeats": 3}
    return {"arguments": arguments, "results": [found | changes]}


def run_of(results: dict, command: str = "python benchmarks/speed.py") -> dict:
    machine = {"cpu": "a CPU", "cores": "2 cores"}
    shared = {"command": command, "date": "2026-11-24", "seconds": 61, "machine": machine, "versions": {"torch": "2"}}
    return {**shared, "results": results}


def results_of(routed: dict) -> dict:
    points = [
        {"x": x, "tokens": 10 * x, "seconds": 0.5 * x, "extra_peak_bytes": 2**20, "rows_per_second": 3.0 * x**0.5}
        for x in (1, 2, 4)
    ]
    curves = [curve("contrastive score", over, points, ("seconds", "extra_peak_bytes")) for over in ("tokens", "rows")]
    curves.append(curve("likelihood job", "processes", points, ("rows_per_second",)))
    runs = {
        "routed decoding": {"command": "routed_decoding.py", "seconds": 3.0, "results": routed},
        "growth": {"command": "growth.py", "seconds": 4.0, "results": {"curves": curves}},
    }
    return {"arguments": {"size": "small"}, **speed.collect(runs)}


def test_exponent_is_the_slope_of_logarithms():
    xs, ys = [3.0, 5.0, 8.0, 20.0], [2.0, 7.0, 9.0, 31.0]
    logs = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    mean_x, mean_y = (sum(pair[i] for pair in logs) / 4 for i in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread
    left = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in logs)
    half = 4.302653 * math.sqrt(left / 2 / spread)  # Student's t, 2 degrees of freedom
    fit = power_law(xs, ys)
    assert fit["exponent"] == pytest.approx(slope)
    assert fit["ci95"] == pytest.approx([slope - half, slope + half], rel=1e-6)
    assert power_law([1, 2], [3.0, 12.0]) == {"exponent": pytest.approx(2.0), "ci95": [None, None]}


def test_one_size_has_no_exponent():
    with pytest.raises(ValueError, match=r"sizes \[4, 4\] has no exponent: measure at two"):
        power_law([4, 4], [1.0, 2.0])
    assert curve("job", "processes", [{"x": 1, "rows_per_second": 2.0}], ("rows_per_second",))["exponents"] == {}


def test_tokens_are_fitted_over_what_went_through():
    points = [{"x": x, "tokens": x * x, "seconds": float(x)} for x in (2, 4, 8)]
    assert curve("", "tokens", points, ("seconds",))["exponents"]["seconds"]["exponent"] == pytest.approx(0.5)
    assert curve("", "rows", points, ("seconds",))["exponents"]["seconds"]["exponent"] == pytest.approx(1.0)


@pytest.mark.parametrize(("sign", "value", "met"), [("≥", 0.85, True), ("≥", 0.84, False), ("≤", 1.06, False)])
def test_goal(sign, value, met):
    goal = (sign, 0.85 if sign == "≥" else 1.05)
    assert speed_ratios.ratio("", "", goal, value, "", "")["met"] is met


def test_routed_speed_is_judged_at_tenfold_steps_only():
    share, faster = speed_ratios.routed_ratios(routed_result())
    assert share["met"] is True and faster["goal"] is None and faster["met"] is None
    _, faster = speed_ratios.routed_ratios(routed_result(step_ratio=14.0))
    assert faster["goal"] == ("≥", 2.8) and faster["met"] is False
    (rates,) = speed_ratios.routed_rates(routed_result())
    assert rates["tokens_per_second"]["ideal"] == pytest.approx(50 / 9)


def test_every_part_has_its_ratios():
    assert {part.file for name, part in speed.PARTS.items() if name != "growth"} == set(speed_ratios.RATIOS)


@pytest.mark.slow
def test_part_runs_once(tmp_path, monkeypatch, capfd):
    sizes = {"quick": "--vocab_sizes 64 --hidden_size 32 --intermediate_size 32 --layers 1 --rows 2 --repeats 1"}
    monkeypatch.setitem(speed.PARTS, "token rewards", speed.PARTS["token rewards"]._replace(sizes=sizes))
    arguments = speed.SpeedArguments(size="quick", only=["token rewards"], output_dir=str(tmp_path))
    results = speed.main(arguments)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["arguments"]["size"] == "quick" and written["curves"] == written["routed"] == []
    measured = json.loads((tmp_path / "token_rewards" / "token_rewards.json").read_text())
    judged, other = written["ratios"]
    assert judged["value"] == measured["results"][0]["share"]["forward"] and judged["goal"] == ["≥", 0.8]
    assert judged["met"] is (judged["value"] >= 0.8) and other["goal"] is None
    assert "--device cpu" in written["parts"]["token rewards"]["command"]

    def refuse(*_, **__):
        raise AssertionError("a finished part was run again")

    monkeypatch.setattr(speed.subprocess, "run", refuse)
    assert speed.main(arguments) == results
    arguments.dtype = "bfloat16"  # another command
    with pytest.raises(AssertionError, match="run again"):
        speed.main(arguments)
    capfd.readouterr()


def test_unknown_part(tmp_path):
    with pytest.raises(SystemExit, match="--only has no part rewards: use contrast,"):
        speed.main(speed.SpeedArguments(only=["rewards"], output_dir=str(tmp_path)))


def test_page(tmp_path):
    stored = json.loads(json.dumps(results_of(routed_result(share_of_ideal=0.7))))  # goals come back as lists
    runs = {"speed": run_of(stored)}
    text = page_module.page(runs)
    assert "| routed decoding, share of the ideal | ideal time / ours | 0.7 (0.5b + 3b, batch 1, 12 % LLM" in text
    assert text.count("**does not hold**") == 1 and "**holds**" not in text
    assert "CPU: 0 of 1 goals are met. Missed: routed decoding, share of the ideal" in text
    assert "| CPU | contrastive score | tokens | 1 – 4 | seconds | 0.5 → 2 | 1.00 (1.00 – 1.00) |" in text
    assert "4 processes of an offline job do 6.0 rows a second, 50 % of 4 times what 1 does" in text
    assert "| CPU | 0.5b + 3b | 1 | 10.00 | 5.56 | 5.00 | 2.00 | 90 % |" in text
    page_module.figures(runs, tmp_path)
    for file in ("speed_ratios.png", "speed_growth.png", "speed_routed.png"):
        assert f"figures/{file}" in text and (tmp_path / file).stat().st_size > 5000


def test_page_of_two_machines():
    wide = routed_result()
    wide["results"] = [routed_result(batch=batch)["results"][0] for batch in (1, 16)]
    runs = {"speed": run_of(results_of(routed_result())), "speed_gpu": run_of(results_of(wide), "on a GPU")}
    lines = page_module.page(runs).splitlines()
    shares = [line for line in lines if line.startswith("| routed decoding, share of the ideal")]
    assert len(shares) == 2 and shares[0].count("**holds**") == 2
    assert "| – |  |  | 0.9 (0.5b + 3b, batch 16" in shares[1]  # nothing to compare with on the CPU
