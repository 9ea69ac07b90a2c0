"""Routing on a real model: the layers that the small model keeps, what is trained on, and the page from its seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.experiments import real_routing
from benchmarks.experiments.real_routing import (
    RealRoutingArguments,
    evenly_spaced,
    main,
    results_of,
    sft_rows,
    tables,
    write_some_layers,
)
from benchmarks.experiments.routing_ledger import LLM, POLICIES, SLM
from benchmarks.render import ROOT, fill
from tests.benchmarks.test_routing_page import made_up_seed
from tokalign.stage.jobs import Dropped
from tokalign.worlds.ledger import build_tokenizer

RATES = [0.04, 0.12]


@pytest.mark.parametrize(("layers", "share"), [(30, 1 / 3), (24, 0.5), (6, 0.2), (2, 1.0)])
def test_kept_layers_are_a_share_with_both_ends(layers: int, share: float) -> None:
    kept = evenly_spaced(layers, share)
    assert len(set(kept)) == len(kept) == max(2, round(share * layers))
    assert (kept[0], kept[-1]) == (0, layers - 1) and kept == sorted(kept)


def test_the_small_model_is_the_large_one_without_some_layers(tmp_path: Path) -> None:
    """Layers that are left out in the large model by hand leave the same logits."""
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 6}
    large = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
    large.save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    write_some_layers(str(tmp_path / "large"), tmp_path / "small", 0.5)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.config.num_hidden_layers == 3 == len(small.model.layers)
    ids = torch.arange(5, 17)[None]
    whole = large(ids).logits
    large.model.layers = torch.nn.ModuleList(large.model.layers[layer] for layer in (0, 2, 5))
    for number, layer in enumerate(large.model.layers):
        layer.self_attn.layer_idx = number
    large.config.num_hidden_layers = 3
    torch.testing.assert_close(small(ids).logits, large(ids).logits)
    assert not torch.allclose(small(ids).logits, whole)


def test_only_finished_answers_are_trained_on_and_no_prompt() -> None:
    row = {"id": "a", "prompt_ids": [5, 6], "completion_ids": [7, 8, 2], "finish_reason": "stop"}
    kept, dropped = sft_rows([row, row | {"finish_reason": "length"}])
    assert kept == {"id": "a", "input_ids": [5, 6, 7, 8, 2], "completion_mask": [0, 0, 1, 1, 1]}
    assert isinstance(dropped, Dropped)


def made_up(number: int) -> dict:
    """A seed as its cell holds it."""
    seed = made_up_seed(number)
    right = {name: dict.fromkeys(points, 0.3) for name, points in seed["points"].items() if name != "query-level"}
    return seed | {"right": right, "parameters": {"slm": 6e7, "llm": 1.3e8, "router": 1e5}}


def arguments(tmp_path: Path, seeds: int) -> RealRoutingArguments:
    return RealRoutingArguments(output_dir=str(tmp_path), data="data", seeds=seeds, rates=RATES)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_page_is_rendered_from_the_seeds_that_are_there(tmp_path: Path, seeds: int) -> None:
    found = results_of(arguments(tmp_path, 3), [made_up(number) for number in range(seeds)])
    results = json.loads(json.dumps(found))
    shown = tables(results)
    assert shown["seeds"] == str(seeds) and shown["size_ratio"] == "2"
    assert shown["right"][0] == ("LLM tokens", *(p for p in POLICIES if p != "query-level"))
    assert shown["right"][1][0][1].startswith("30.0") and shown["slm_right"].startswith("30.0")
    verdicts = {row[0]: row[-1] for row in shown["claims"][1]}
    word = "holds" if seeds == 3 else "cannot be told here"
    assert verdicts["neural router > random at 12 %"] == f"**{word}**"
    assert list(real_routing.figures(results)) == [real_routing.PICTURE]
    text = (ROOT / "docs" / "results" / "routing.md").read_text(encoding="utf-8")
    runs = {"real_routing": shown | {"run": (("command",), [["`make real`"]])}}
    fill(text, runs.get)  # raises where a mark asks for what the tables have not


def test_seeds_are_kept_and_a_gap_ends_the_results(tmp_path: Path, monkeypatch) -> None:
    """A seed that fails leaves those before it in results.json; the next start makes only what is missing."""
    made = []

    def run(self):
        if self.seed == 1 and not made.count("again"):
            raise RuntimeError("killed")
        made.append(self.seed)
        return made_up(self.seed)

    monkeypatch.setattr(real_routing.RealRoutingSeed, "__init__", lambda self, args, seed: setattr(self, "seed", seed))
    monkeypatch.setattr(real_routing.RealRoutingSeed, "run", run)
    with pytest.raises(RuntimeError, match="killed"):
        main(arguments(tmp_path, 3))
    assert json.loads((tmp_path / "results.json").read_text())["arguments"]["seeds"] == 1
    made.append("again")
    results = main(arguments(tmp_path, 3))
    assert made == [0, "again", 1, 2] and results["arguments"]["seeds"] == 3
    assert set(results["right"]) >= {SLM, LLM}
