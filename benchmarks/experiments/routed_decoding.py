r"""Speed of routed decoding at the shapes of real pairs: random weights, decisions replayed at a fixed LLM rate.

    python -m benchmarks.experiments.routed_decoding                                      # Qwen2.5 0.5B + 3B, bf16, CPU
    python -m benchmarks.experiments.routed_decoding --pair 1.5b 3b --router_only true    # the router's time alone
    python -m benchmarks.experiments.routed_decoding --pair 1.5b 8b --device cuda --batch_sizes 1 16 64
    python -m benchmarks.experiments.routed_decoding --pair thin-2 thin-24 --ask_router false \
        --vocab_size 8192 --batch_sizes 4 16 32

What is decided does not matter to speed, so the decisions are drawn once (12 % of the positions) and replayed, and the
real router is run and its answer thrown away. The weights are random, but each model's head makes one token follow
another: the LLM writes v + 1 behind v, and so does the SLM but at the replayed positions. So the pair agrees on 88 % of
the tokens, and lossless decoding can be timed beside routing: `verified` (the policy looks where the models differ, as
a perfect router would), `drafts of 16` (it never does) and, at batch 1, transformers' assisted generation. All of them
write the LLM's text.

The `thin` shapes are no published models: many narrow layers, whose step costs nearly the same for 32 rows as for one.
That is how a GPU behaves on which reading the weights takes the time, so they show on a CPU what waiting for the LLM
in company is worth there. From two rows on `lock step` is routed decoding whose rows never wait for others (`llm_wait`
0). Prompts and completions can be of unequal length.

All ways run in the same process, in turns. `ideal` is what the forward passes of routed decoding would take if nothing
else cost anything: stock transformers forwards of each model with a filled cache, timed alone, times how often routed
decoding needs them (a hand-off feeds the LLM everything since the last one in one forward). Beside it: the router's
share of an SLM step. Writes results.json to `output_dir`; speed.py judges it.
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.progress import track
from transformers import DynamicCache, HfArgumentParser, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.experiments.measure import timed, word_tokenizer
from benchmarks.render import Tables, save
from tokalign.generation.protocol import Completion, SamplingParams
from tokalign.routing.decode.generator import RoutedGenerator
from tokalign.routing.decode.policies import AlwaysLLM, NeverLLM, NextTokens, ReplayPolicy
from tokalign.routing.router.model import TokenRouter, TokenRouterConfig

QWEN25 = {"num_key_value_heads": 2}
# Hidden size, MLP size, layers, heads and the rest of the published configurations; `tiny` and the thin ones are none
SHAPES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    name: (
        (Qwen2Config, Qwen2ForCausalLM) if "num_key_value_heads" in extra else (Qwen3Config, Qwen3ForCausalLM),
        (hidden, mlp, layers, heads),
        extra,
    )
    for name, hidden, mlp, layers, heads, extra in (
        ("tiny", 256, 1024, 4, 4, QWEN25),
        ("thin-2", 64, 64, 2, 2, QWEN25),
        ("thin-24", 64, 64, 24, 2, QWEN25),
        ("0.5b", 896, 4864, 24, 14, QWEN25),
        ("1.5b", 1536, 8960, 28, 12, QWEN25),
        ("3b", 2048, 11008, 36, 16, QWEN25),
        ("7b", 3584, 18944, 28, 28, {"num_key_value_heads": 4}),
        ("8b", 4096, 12288, 36, 32, {"head_dim": 128}),
    )
}
WARM_UP = 3
ASSISTED = "assisted generation"  # of transformers
GRID = (1, 2, 4, 8, 16, 32, 64, 128)  # widths at which forwards are timed


@dataclass
class Arguments:
    """Which pair, and how long."""

    pair: list[str] = field(default_factory=lambda: ["0.5b", "3b"], metadata={"help": f"Two of {', '.join(SHAPES)}."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16])
    rate: float = field(default=0.12, metadata={"help": "Share of positions that the LLM writes."})
    prompt_length: int = 64
    longest_prompt: int | None = field(
        default=None,
        metadata={"help": "Prompts from `prompt_length` to this many tokens, evenly spread; unset: equal."},
    )
    new_tokens: int = 50
    shortest_output: int | None = field(
        default=None,
        metadata={"help": "Completions from this many to `new_tokens` tokens, evenly spread; unset: equal."},
    )
    vocab_size: int = 151936
    device: str = "cpu"
    dtype: str = "bfloat16"
    ask_router: bool = field(
        default=True, metadata={"help": "Run the router at every step; a thin model's step is far less work than that."}
    )
    router_only: bool = field(default=False, metadata={"help": "Only the router's share of a step of the SLM."})
    repeats: int = field(default=3, metadata={"help": "Turns of all ways; medians are reported."})
    seed: int = 0
    output_dir: str = "runs/benchmarks/routed_decoding"


def random_model(shape: str, arguments: Arguments) -> Any:
    """A model of this shape with random weights, made in its own type: no fp32 copy ever exists."""
    (config_class, model_class), (hidden, mlp, layers, heads), extra = SHAPES[shape]
    config = config_class(
        vocab_size=arguments.vocab_size,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=32768,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        # A head of its own, also where the published model shares it: the head says which token follows. A step reads
        # as many weights either way.
        tie_word_embeddings=False,
        dtype=arguments.dtype,
        **({"num_key_value_heads": 8} | extra),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, arguments.dtype))
    try:
        with torch.device("meta"):
            model = model_class(config)
        model.to_empty(device=arguments.device)
        model.tie_weights()
        generator = torch.Generator(arguments.device).manual_seed(arguments.seed)
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.data.fill_(1.0)
            elif "embed_tokens" in name:
                weight.data.uniform_(-1.0, 1.0, generator=generator)
            else:
                # What a layer adds stays far below a token's own embedding, which so reaches the head.
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.data.uniform_(-0.03, 0.03, generator=generator).mul_(0.01 if last else 1)
        rotary = model.model.rotary_emb  # its buffers are computed, not loaded
        model.model.rotary_emb = type(rotary)(config).to(arguments.device)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return model.eval()


def teach(model: Any, others: list[int]) -> None:
    """Let v + 1 follow every token v, but behind `others` the successor of another of them.

    The head's row of a token is the embedding of the one before it, so that token has the largest logit by far.
    """
    embedding, head = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
    head.copy_(embedding.roll(1, dims=0))
    before = torch.tensor(others, dtype=torch.int64, device=head.device)
    head[(before + 1) % len(head)] = embedding[before.roll(1)]


def random_router(slm: Any, arguments: Arguments) -> TokenRouter:
    """The paper's architecture at the SLM's width, untrained; its speed is that of a trained one."""
    hidden = slm.config.hidden_size
    config = TokenRouterConfig(hidden_size=hidden, embedding_size=hidden, shared_vocab=arguments.vocab_size)
    router = TokenRouter(config).to(arguments.device, getattr(torch, arguments.dtype)).eval()
    router.attach_embedding(slm.get_input_embeddings().weight)
    return router


class RoutedReplay(ReplayPolicy):
    """Given decisions, after the router was asked: what it answers is not used, its time is spent."""

    needs_hidden = True

    def __init__(self, steps: list[set[int]], router: TokenRouter):
        super().__init__(steps)
        self.router = router

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        self.router.scores(tokens.hidden, tokens.logits)
        return super().scores(tokens)


class Forwards:
    """Seconds of one stock forward of `rows` × `width` new tokens, measured once each.

    A single token is read behind a cache of the middle of the run; so is what a hand-off reads, and a prompt behind
    none. Between the measured widths (GRID) seconds are interpolated along a line: no width is priced above its own.
    """

    def __init__(self, model: Any, past: int, arguments: Arguments):
        self.model, self.past, self.arguments = model, past, arguments
        self.known: dict[tuple[int, int], float] = {}

    def seconds(self, rows: int, width: int) -> float:
        at = next((i for i, w in enumerate(GRID) if w >= width), None)
        if at is None or GRID[at] == width:
            return self.measured(rows, width)
        low, high = GRID[at - 1], GRID[at]
        share = (width - low) / (high - low)
        return (1 - share) * self.measured(rows, low) + share * self.measured(rows, high)

    def measured(self, rows: int, width: int) -> float:
        if (rows, width) not in self.known:
            device, vocabulary = self.arguments.device, self.arguments.vocab_size
            length = 0 if width >= self.arguments.prompt_length else self.past
            with torch.inference_mode():
                cache = DynamicCache(config=self.model.config)
                if length:
                    past = torch.randint(vocabulary, (rows, length), device=device)
                    self.model(past, past_key_values=cache, logits_to_keep=1)
                new = torch.randint(vocabulary, (rows, width), device=device)
                times = []
                for _ in range(1 + WARM_UP):
                    times.append(timed(lambda: self.model(new, past_key_values=cache, logits_to_keep=1), device))
                    cache.crop(-width)
            self.known[rows, width] = statistics.median(times[-WARM_UP:])
        return self.known[rows, width]


def spread(low: int, high: int, count: int, seed: int) -> list[int]:
    """`count` whole numbers from `low` to `high`, evenly spread, in a random order; one number is the middle."""
    shares = [(i / (count - 1) if count > 1 else 0.5) for i in range(count)]
    numbers = [round(low + share * (high - low)) for share in shares]
    random.Random(seed).shuffle(numbers)
    return numbers


def decisions(lengths: list[int], arguments: Arguments) -> list[set[int]]:
    """For every row the steps that the LLM writes: the wanted share of them, at random places of its own.

    The first step is left out, so that no row starts with a hand-off of the prompt.

    Args:
        lengths: tokens that each row writes.
    """
    draw = random.Random(arguments.seed)
    return [set(draw.sample(range(1, length), round(arguments.rate * length))) for length in lengths]


def ideal_seconds(steps: list[set[int]], prompts: list[int], outputs: list[int], slm: Forwards, llm: Forwards) -> float:
    """What the forwards that routed decoding in lock step needs take by themselves, the prompts' prefills included.

    Args:
        prompts, outputs: tokens of each row's prompt and completion.
    """
    total = 0.0
    seen = [0] * len(steps)  # tokens that the LLM has seen of each row
    for t in range(max(outputs)):
        going = [row for row, length in enumerate(outputs) if t < length]
        total += slm.seconds(len(going), math.ceil(sum(prompts) / len(prompts)) if t == 0 else 1)
        routed = [row for row in going if t in steps[row]]
        unseen = [prompts[row] + t - seen[row] for row in routed]
        if routed:  # one pass without padding: a long prompt drags no short hand-off along
            total += llm.seconds(len(routed), math.ceil(sum(unseen) / len(routed)))
        for row in routed:
            seen[row] = prompts[row] + t
    return total


def compare(batch: int, slm: Any, llm: Any, router: TokenRouter, arguments: Arguments) -> dict[str, Any]:
    """All ways in turns, and the ideal, for one batch size."""
    draw, most = random.Random(arguments.seed + 1), arguments.new_tokens
    lengths = spread(arguments.prompt_length, arguments.longest_prompt or arguments.prompt_length, batch, 0)
    outputs = spread(arguments.shortest_output or most, most, batch, 1)
    prompts = [[draw.randrange(1000) for _ in range(length - 1)] for length in lengths]
    # A row counts up from its own number, and meets no other row's and none of the tokenizer's special tokens
    starts = [1000 + row * (arguments.new_tokens + 1) for row in range(batch)]
    prompts = [[*prompt, start] for prompt, start in zip(prompts, starts, strict=True)]
    # ReplayPolicy finds a row's decisions by its seed
    params = [SamplingParams(temperature=0, max_tokens=count, seed=row) for row, count in enumerate(outputs)]
    steps = decisions(outputs, arguments)
    tokenizer = word_tokenizer(arguments.vocab_size)
    teach(llm, [])
    teach(slm, [start + step for start, row in zip(starts, steps, strict=True) for step in row])
    routed = RoutedReplay(steps, router) if arguments.ask_router else ReplayPolicy(steps)
    policies = {"SLM only": NeverLLM(), "routed": routed, "LLM only": AlwaysLLM()}
    engines = {name: RoutedGenerator(slm, llm, tokenizer, policy) for name, policy in policies.items()}
    if batch > 1:
        engines["lock step"] = RoutedGenerator(slm, llm, tokenizer, routed, llm_wait=0)
    for name, policy in (("verified", routed), ("drafts of 16", NeverLLM())):
        engines[name] = RoutedGenerator(slm, llm, tokenizer, policy, verify=True)
    ways = {name: lambda e=engine: e.generate(prompts, params) for name, engine in engines.items()}
    if batch == 1:  # it takes one sequence at a time
        ways[ASSISTED] = lambda: assisted(slm, llm, prompts[0], outputs[0], arguments.device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    written, looks = 0, {}
    for turn in track(range(arguments.repeats + 1), description=f"batch {batch}"):
        for name, way in ways.items():
            results: list[Any] = []
            taken = timed(lambda w=way, r=results: r.extend(w()), arguments.device)
            # the LLM's text is the numbers behind the prompt's last one, none missing
            texts = [list(range(start + 1, start + 1 + count)) for start, count in zip(starts, outputs, strict=True)]
            wrong = [c[0].token_ids for c in results] != texts
            if wrong and name != "SLM only":
                raise RuntimeError(f"{name} does not write the LLM's text: a random model must go on as it was taught.")
            if turn:  # the first is to warm up
                seconds[name].append(taken)
            if name == "routed":
                written = sum(sum(c.written_by) for (c,) in results)
            if name != ASSISTED:
                looks[name] = sum(c.stats.handoffs for (c,) in results)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    past = (sum(lengths) + sum(outputs) // 2) // batch
    forwards = {"slm": Forwards(slm, past, arguments), "llm": Forwards(llm, past, arguments)}
    ideal = ideal_seconds(steps, lengths, outputs, forwards["slm"], forwards["llm"])
    tokens = sum(outputs)
    return {
        "batch": batch,
        "tokens": tokens,
        "llm_rate": written / tokens,
        "seconds": seconds,
        "tokens_per_second": {name: tokens / s for name, s in medians.items()},
        "tokens_per_llm_pass": {name: tokens / looks[name] for name in ("routed", "verified", "drafts of 16")},
        "step_ratio": forwards["llm"].seconds(batch, 1) / forwards["slm"].seconds(batch, 1),
        "ideal_seconds": ideal,
        "share_of_ideal": ideal / medians["routed"],
        "speedup_over_llm_only": medians["LLM only"] / medians["routed"],
        "forward_seconds": {
            name: {f"{rows}x{width}": s for (rows, width), s in sorted(f.known.items())} for name, f in forwards.items()
        },
        "router": router_share(batch, slm, router, forwards["slm"].seconds(batch, 1), arguments),
    }


def assisted(slm: Any, llm: Any, prompt: list[int], count: int, device: str) -> list[list[Completion]]:
    """transformers' assisted generation, greedy: the SLM drafts, the LLM verifies."""
    ids = torch.tensor([prompt], device=device)
    written = llm.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        assistant_model=slm,
        do_sample=False,
        max_new_tokens=count,
    )
    return [[Completion(written[0, len(prompt) :].tolist(), [], "length")]]


@torch.inference_mode()
def router_share(batch: int, slm: Any, router: TokenRouter, step: float, arguments: Arguments) -> dict[str, float]:
    """The router's own time beside one decoding step of the SLM: features from hidden and logits, and its layers."""
    dtype = getattr(torch, arguments.dtype)
    hidden = torch.randn(batch, slm.config.hidden_size, device=arguments.device, dtype=dtype)
    logits = torch.randn(batch, arguments.vocab_size, device=arguments.device, dtype=dtype)
    times = [timed(lambda: router.scores(hidden, logits), arguments.device) for _ in range(WARM_UP + 9)]
    seconds = statistics.median(times[WARM_UP:])
    return {"seconds": seconds, "share_of_slm_step": seconds / step}


def tables(results: dict[str, Any]) -> Tables:
    """The ways beside the ideal, or the router's time beside a step of the SLM, by batch size."""
    rows = []
    ways = list(dict.fromkeys(way for r in results["results"] for way in r.get("tokens_per_second", ())))
    for r in results["results"]:
        if results["arguments"]["router_only"]:
            times = (f"{1e3 * r[key]:.1f}" for key in ("slm_step_seconds", "seconds"))
            rows.append([str(r["batch"]), *times, f"{100 * r['share_of_slm_step']:.1f} %"])
            continue
        speeds = (f"{r['tokens_per_second'][way]:.2f}" if way in r["tokens_per_second"] else "–" for way in ways)
        ratios = (f"{r[key]:.2f}" for key in ("step_ratio", "speedup_over_llm_only", "share_of_ideal"))
        share = f"{100 * r['router']['share_of_slm_step']:.1f} %"
        rows.append([str(r["batch"]), f"{100 * r['llm_rate']:.1f} %", *speeds, *ratios, share])
    if results["arguments"]["router_only"]:
        return {"router": (("batch", "SLM step, ms", "router, ms", "share"), rows)}
    ratio_names = ("LLM step / SLM step", "routed / LLM only", "share of ideal", "router / step")
    return {"routed decoding": (("batch", "LLM rate", *(f"{way}, tokens/s" for way in ways), *ratio_names), rows)}


def router_alone(slm: Any, router: TokenRouter, arguments: Arguments) -> list[dict[str, float]]:
    """The router's time beside a step of the SLM behind a cache of a prompt, by batch size."""
    forwards, shares = Forwards(slm, arguments.prompt_length, arguments), []
    for batch in arguments.batch_sizes:
        step = forwards.seconds(batch, 1)
        share = router_share(batch, slm, router, step, arguments)
        shares.append({"batch": batch, "slm_step_seconds": step, **share})
    return shares


def main(arguments: Arguments) -> dict[str, Any]:
    for name in arguments.pair:
        if name not in SHAPES:
            raise SystemExit(f"--pair has {name!r}: use two of {', '.join(SHAPES)}.")
    torch.manual_seed(arguments.seed)
    slm = random_model(arguments.pair[0], arguments)
    router = random_router(slm, arguments)
    if arguments.router_only:
        measured = router_alone(slm, router, arguments)
    else:
        llm = random_model(arguments.pair[1], arguments)
        measured = [compare(batch, slm, llm, router, arguments) for batch in arguments.batch_sizes]
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return save(arguments.output_dir, {"arguments": asdict(arguments), "machine": machine, "results": measured}, tables)


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
