"""benchmarks/experiments/speed.py: one part run for real at the smallest size, the goals, and what its page shows."""

from __future__ import annotations

import json

import pytest

from benchmarks.experiments import credit_step, speed, structured_credit
from tokalign.trainers.credits.field import FieldCredit


def routed_result(**changes) -> dict:
    """What routed_decoding.py writes for one batch size."""
    found = {
        "batch": 1,
        "tokens": 50,
        "llm_rate": 0.12,
        "tokens_per_second": {"SLM only": 10.0, "routed": 5.0, "LLM only": 2.0},
        "ideal_seconds": 9.0,
        "step_ratio": 6.7,
        "share_of_ideal": 0.9,
        "speedup_over_llm_only": 2.5,
    }
    arguments = {"pair": ["0.5b", "3b"], "new_tokens": 50, "repeats": 3}
    return {"arguments": arguments, "results": [found | changes]}


def results_of(routed: dict, **arguments: str) -> dict:
    runs = {"routed decoding": {"command": "routed_decoding.py", "seconds": 3.0, "results": routed}}
    return json.loads(json.dumps({"arguments": {"device": "cpu"} | arguments, **speed.collect(runs)}))  # as it is read


@pytest.mark.parametrize(("sign", "value", "met"), [("≥", 0.85, True), ("≥", 0.84, False), ("≤", 1.06, False)])
def test_goal(sign, value, met):
    goal = (sign, 0.85 if sign == "≥" else 1.05)
    assert speed.ratio("", "", goal, value, "", "")["met"] is met


def test_routed_speed_is_judged_at_tenfold_steps_only():
    share, faster = speed.routed_ratios(routed_result())
    assert share["met"] is True and faster["goal"] is None and faster["met"] is None
    _, faster = speed.routed_ratios(routed_result(step_ratio=14.0))
    assert faster["goal"] == ("≥", 2.8) and faster["met"] is False
    (rates,) = speed.routed_rates(routed_result())
    assert rates["tokens_per_second"]["ideal"] == pytest.approx(50 / 9)


def test_credit_is_judged_by_its_slowest_kind_with_a_reference(tmp_path, capsys):
    small = structured_credit.StructuredCreditArguments(completions=2, rounds=1, output_dir=str(tmp_path))
    result = structured_credit.main(small)
    times = {row["kind"]: row["ratio"] for row in result["results"]}
    slowest, equal, alone, offsets = speed.credit_ratios(json.loads((tmp_path / "results.json").read_text()))
    assert equal["value"] == times.pop("equal to the reference") and alone["value"] == times.pop("no reference")
    assert slowest["value"] == max(times.values()) > 0 and slowest["goal"] == ("≤", 2)
    assert equal["goal"] is alone["goal"] is offsets["goal"] is None
    capsys.readouterr()


@pytest.mark.slow
def test_steps_with_field_credit_credit_fields(tmp_path, monkeypatch, capsys):
    said, credit = [], FieldCredit.__call__

    def recorded(*args, **columns):
        said.append(credit(*args, **columns))
        return said[-1]

    monkeypatch.setattr(FieldCredit, "__call__", recorded)
    shape = {"vocab_size": 400, "hidden_size": 64, "layers": 1, "size": 300, "pairs": 1}
    result = credit_step.main(credit_step.CreditStepArguments(**shape, output_dir=str(tmp_path)))
    assert len(said) == 3 and all(len(set(row)) > 2 for rows in said for row in rows)  # of one trainer's three steps
    sequence, field = (result["seconds"][credit] for credit in credit_step.CREDITS)
    (row,) = speed.credit_step_ratios(json.loads((tmp_path / "results.json").read_text()))
    assert row["value"] == field[0] / sequence[0] > 0 and row["goal"] == ("≤", 1.05)
    capsys.readouterr()


@pytest.mark.slow
def test_part_runs_once(tmp_path, monkeypatch, capfd):
    sizes = "--vocab_size 64 --hidden_size 64 --layers 1 --pairs 1"
    monkeypatch.setitem(speed.PARTS, "T-REG step", speed.PARTS["T-REG step"]._replace(quick=f"--method treg {sizes}"))
    arguments = speed.SpeedArguments(size="quick", only=["T-REG step"], output_dir=str(tmp_path))
    results = speed.main(arguments)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["arguments"]["size"] == "quick" and written["routed"] == []
    (measured,) = json.loads((tmp_path / "T-REG_step" / "results.json").read_text())["results"]
    time, memory = written["ratios"]
    assert time["value"] == measured["time_ratio"] and memory["value"] == measured["memory_ratio"] > 0
    assert time["goal"] == ["≤", 1.05] and time["met"] is (time["value"] <= 1.05)
    assert "--device cpu" in written["parts"]["T-REG step"]["command"]

    def refuse(*_, **__):
        raise AssertionError("a finished part was run again")

    monkeypatch.setattr(speed.subprocess, "run", refuse)
    assert speed.main(arguments) == results
    arguments.dtype = "bfloat16"  # another command
    with pytest.raises(AssertionError, match="run again"):
        speed.main(arguments)
    capfd.readouterr()


def test_unknown_part(tmp_path):
    with pytest.raises(SystemExit, match="no part rewards"):
        speed.main(speed.SpeedArguments(only=["rewards"], output_dir=str(tmp_path)))


def test_tables_and_pictures():
    results = results_of(routed_result(share_of_ideal=0.7))
    shown = speed.tables(results)
    share, faster = shown["ratios"][1]
    assert share[:4] == [
        "routed decoding, share of the ideal",
        "ideal time / ours",
        "CPU",
        "0.7 (0.5b + 3b, batch 1, 12 % LLM, step times 1 : 6.7)",
    ]
    assert share[4:6] == ["≥ 0.85", "**does not hold**"] and faster[4:6] == ["–", "–"]
    assert shown["goals"] == "0 of 1" and shown["missed"].startswith("routed decoding, share of the ideal (0.5b + 3b")
    assert shown["routed"][1] == [["CPU", "0.5b + 3b", "1", "10.00", "5.56", "5.00", "2.00", "90 %"]]
    assert shown["parts"][1] == [["CPU", "`routed_decoding.py`", "3 s"]]
    assert set(speed.figures(results)) == {"speed_ratios.png", "speed_routed.png"}


def test_another_machine_has_pictures_of_its_own():
    results = results_of(routed_result(), device="cuda")
    assert speed.tables(results)["ratios"][1][0][2] == "GPU"
    assert set(speed.figures(results)) == {"speed_ratios_gpu.png", "speed_routed_gpu.png"}
