"""Every policy against its cost: figures over hand-made seeds, and the SLM that is taught to call."""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM

from benchmarks.experiments import routing_policies
from benchmarks.experiments.routing_policies import (
    FULL_DRAFTS,
    HYSTERESIS,
    LLM,
    LOSSLESS,
    MEASURES,
    NEURAL,
    ROUTED,
    SLM,
    figures,
    summarise,
    tables,
    teach_calls,
)
from tests.support import save_tiny, tiny_tokenizer


def point(accuracy: float, llm_rate: float, reads: float) -> dict[str, float]:
    return dict(zip(MEASURES, (accuracy, llm_rate, 1e6, 4e6, reads), strict=True))


def made_up_points(number: int) -> dict:
    """A seed in which hysteresis is 0.1 below the others, and lossless decoding reads half of the LLM's weights."""
    points = {SLM: {"": point(0.5, 0.0, 1e6)}, LLM: {"": point(0.9, 1.0, 8e6)}}
    for name in ROUTED:
        top = 0.85 - 0.1 * (name == HYSTERESIS) + 0.001 * number * (name == NEURAL)
        points[name] = {"0.04": point(top - 0.1, 0.04, 2e6), "0.12": point(top, 0.12, 2.5e6)}
    points[LOSSLESS] = {"0.04": point(0.9, 0.2, 4e6)}
    points[FULL_DRAFTS] = {"16": point(0.9, 0.3, 5e6)}
    return points


def test_differences_at_equal_rate_and_costs_beside_the_llms() -> None:
    results = json.loads(json.dumps(summarise([made_up_points(i) for i in range(3)], [0.04, 0.08, 0.12])))
    shown = tables(results)
    verdicts = {row[0]: row[-1].strip("*") for row in shown["claims"][1]}
    assert verdicts[f"{NEURAL} > {HYSTERESIS} at 8 %"] == "holds"
    assert len(verdicts) == 9
    heading, rows = shown["equal_rate"]
    assert rows[1][1 + heading[1:].index(HYSTERESIS)].startswith("70.0")  # half-way between 0.65 and 0.75
    costs = {(row[0], row[1]): row[-1] for row in shown["costs"][1]}
    assert costs[LOSSLESS, "4 %"].startswith("2.00") and costs[FULL_DRAFTS, "drafts of 16"].startswith("1.60")
    assert set(figures(results)) == {"routing_policies.png"}


def test_an_slm_learns_to_call_where_the_models_diverge(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(routing_policies, "CALLED", "~" if "~" in tiny_tokenizer().get_vocab() else "z")
    slm = save_tiny(tmp_path, seed=0)
    row = {
        "prompt_ids": [7, 8, 9],
        "completion_ids": [10, 11, 12, 13],
        "slm_ids": [10, 30, 12, 31],
        "label": [0, 2, 0, 1],
    }
    teach_calls(slm, [row] * 8, tmp_path / "caller", seed=0, epochs=60)
    taught = AutoModelForCausalLM.from_pretrained(tmp_path / "caller").eval()
    with torch.no_grad():
        written = taught(torch.tensor([[7, 8, 9, 10, 11, 12]])).logits.argmax(-1)[0, 2:].tolist()
    call = tiny_tokenizer().convert_tokens_to_ids(routing_policies.CALLED)
    assert written == [10, call, 12, 31]  # its own token where the difference is neutral
