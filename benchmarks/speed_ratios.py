"""The ratios of speed.py, out of what each benchmark wrote: value, goal, whether it is met, on what and how counted."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]


def ratio(name: str, what: str, goal: tuple[str, float] | None, value: float, detail: str, how: str) -> Result:
    """A row of the table.

    Args:
        goal: ("≥" or "≤", figure), or None where the issue asks for the figure and names no goal.
        detail: on what it was measured. how: repeats, and which of them counts.
    """
    met = None if goal is None else value >= goal[1] if goal[0] == "≥" else value <= goal[1]
    return {"name": name, "what": what, "goal": goal, "value": value, "met": met, "detail": detail, "how": how}


def contrast_ratios(result: Result) -> list[Result]:
    how = f"fastest of {result['arguments']['repeats']} in turns; peaks of one run each"
    rows = []
    for c in result["comparisons"]:
        detail = f"{c['workload']} rows: {c['tokens']:,} tokens, {result['arguments']['vocab_size']:,} words"
        rows += [
            ratio("contrastive scoring, time", "released procedure / ours", ("≥", 3), c["speed-up"], detail, how),
            ratio("contrastive scoring, extra peak", "ours / released", ("≤", 0.2), c["memory ratio"], detail, how),
            ratio("contrastive scoring, overhead", "ours / bare passes", ("≤", 1.3), c["against bare"], detail, how),
        ]
    return rows


def step_ratios(result: Result) -> list[Result]:
    arguments = result["arguments"]
    method = {"critical_token_dpo": "critical-token DPO step", "treg": "T-REG step"}[arguments["method"]]
    rows = []
    for r in result["results"]:
        detail = f"{r['vocab_size']:,} words, {'LoRA' if arguments['peft'] else 'full'}"
        how = f"median of the ratios of {arguments['pairs']} pairs of steps"
        what, alone = "ours / DPOTrainer", "three steps, a process each"
        rows += [
            ratio(f"{method}, time", what, ("≤", 1.05), r["time_ratio"], detail, how),
            ratio(f"{method}, peak memory", what, ("≤", 1.05), r["memory_ratio"], detail, alone),
        ]
    return rows


def rollout_ratios(result: Result) -> list[Result]:
    arguments = result["arguments"]
    rates = {name: r["tokens_per_second"] for name, r in result["results"].items()}
    detail = f"{arguments['num_prompts']} prompts × {arguments['n']}, hidden {arguments['hidden_size']}"
    how = f"fastest of {arguments['repeats']}"
    loop, ours, vllm = "model.generate loop", "transformers engine", "vllm engine"
    pairs = [(ours, loop), *([(vllm, loop), (vllm, ours)] if vllm in rates else [])]
    return [ratio("rollouts, tokens a second", f"{a} / {b}", None, rates[a] / rates[b], detail, how) for a, b in pairs]


def token_reward_ratios(result: Result) -> list[Result]:
    how = f"fastest of {result['arguments']['repeats']} in turns"
    rows = []
    for r in result["results"]:
        detail = f"{r['vocab_size']:,} words"
        for limit, what, goal in (
            ("forward", "bare forward passes / ours", ("≥", 0.8)),
            ("completion head", "passes with the head on completions alone / ours", None),
        ):
            rows.append(ratio("token rewards, share of the limit", what, goal, r["share"][limit], detail, how))
    return rows


def reward_ratios(result: Result) -> list[Result]:
    arguments, kinds = result["arguments"], result["throughput"]
    how = f"median process time of {arguments['rounds']} rounds"
    slow, worded, close = (min(kinds, key=lambda k: k[key]) for key in ("ours", "ours_with_reasons", "ratio"))
    worst, rows = max(result["hostile"], key=lambda h: h["ms"]), result["row_schemas"]
    size = f"{arguments['size']} bytes"
    name, what = "structured reward", f"completions of {size} a second a core"
    return [
        ratio(name, what, ("≥", 20_000), slow["ours"], f"slowest kind: {slow['kind']}", how),
        ratio(name, f"{what}, reasons in words", None, worded["ours_with_reasons"], worded["kind"], how),
        ratio(name, "ours / the same on jsonschema", ("≥", 5), close["ratio"], f"closest kind: {close['kind']}", how),
        ratio(
            f"{name}, hostile text",
            f"milliseconds more for a batch of {arguments['batch']}",
            *(("≤", 50), worst["ms"], f"costliest of {len(result['hostile'])} kinds: {worst['kind']}", how),
        ),
        ratio(
            f"{name}, schemas of rows",
            "compilations / different schemas",
            *(("≤", 1), rows["compiled"] / rows["rows"], f"{rows['rows']:,} rows, read twice", "a count"),
        ),
    ]


TENFOLD = 10  # how many times the SLM's step the LLM's takes where the goal of 2.8 is meant


def routed_ratios(result: Result) -> list[Result]:
    arguments = result["arguments"]
    pair = " + ".join(arguments["pair"])
    how = f"median of {arguments['repeats']} in turns"
    rows = []
    for r in result["results"]:
        detail = f"{pair}, batch {r['batch']}, {100 * r['llm_rate']:.0f} % LLM, step times 1 : {r['step_ratio']:.1f}"
        goal = ("≥", 2.8) if r["step_ratio"] >= TENFOLD else None
        rows += [
            ratio(
                "routed decoding, share of the ideal",
                "ideal time / ours",
                ("≥", 0.85),
                r["share_of_ideal"],
                detail,
                how,
            ),
            ratio("routed decoding, speed", "routed / LLM only", goal, r["speedup_over_llm_only"], detail, how),
        ]
    return rows


def router_ratios(result: Result) -> list[Result]:
    return [
        ratio(
            "router",
            "its time / a step of the SLM",
            *(("≤", 0.05), r["share_of_slm_step"], f"{result['arguments']['pair'][0]}, batch {r['batch']}"),
            "median of 9; the step: of 3",
        )
        for r in result["results"]
    ]


def routed_rates(result: Result) -> list[Result]:
    """Tokens a second of the three ways and of the ideal, by batch size."""
    tokens, pair = result["arguments"]["new_tokens"], result["arguments"]["pair"]
    return [
        {
            "pair": pair,
            "batch": r["batch"],
            "tokens_per_second": r["tokens_per_second"] | {"ideal": r["batch"] * tokens / r["ideal_seconds"]},
        }
        for r in result["results"]
    ]


RATIOS = {  # by the file that a benchmark writes; routed_decoding.py writes one of two
    "contrast.json": contrast_ratios,
    "critical_token_dpo/results.json": step_ratios,
    "treg/results.json": step_ratios,
    "rollouts.json": rollout_ratios,
    "token_rewards.json": token_reward_ratios,
    "structured_reward.json": reward_ratios,
    "router.json": router_ratios,
    "results.json": routed_ratios,
}
