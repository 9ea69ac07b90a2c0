"""GPU memory of training at sizes that this machine cannot hold, from shapes: what benchmarks/scale.py prints.

Model states are DeepSpeed's own estimates (ZeRO, arXiv 1910.02054: 2 bytes a weight and 18 a trained one); what these
do not cover (activations, the language model's head, a reference) has its equation here. Parameters are counted on
models built from their configuration on the meta device, so nothing is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs, model_to_params
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

GB = 10**9
GPUS_PER_NODE = 8
STAGES = ("0", "1", "2", "3", "3, offload")
METHODS = {"full": "full, frozen copy", "full, no copy": "full, log-probs ahead", "LoRA": "LoRA, adapter off"}
GPUS = (8, 16, 64)
LENGTHS = (2048, 8192)
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")  # that of the recipes
ROWS = 2  # of one preference pair on a device: chosen and rejected
# The models' published config.json: vocabulary, width, MLP width, layers, heads, key/value heads
CONFIGS: dict[str, PreTrainedConfig] = {
    name: kind(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        tie_word_embeddings=tied,
    )
    for name, kind, vocabulary, width, inner, layers, heads, shared, tied in (
        ("Qwen2.5-1.5B", Qwen2Config, 151936, 1536, 8960, 28, 12, 2, True),
        ("Llama-3-8B", LlamaConfig, 128256, 4096, 14336, 32, 32, 8, False),
        ("Qwen2.5-32B", Qwen2Config, 152064, 5120, 27648, 64, 40, 8, False),
        ("Llama-3-70B", LlamaConfig, 128256, 8192, 28672, 80, 64, 8, False),
    )
}


@dataclass(frozen=True)
class Shape:
    """What the memory of a model follows from.

    Args:
        parameters: of the model, shared ones once. adapter: of a LoRA adapter on it. largest_layer: of its largest
            module, which ZeRO-3 gathers whole.
        width, inner, layers, vocabulary: of the hidden state, the MLP, the stack and the head. key_value: width of
            the keys, and of the values.
    """

    name: str
    parameters: int
    adapter: int
    largest_layer: int
    width: int
    inner: int
    key_value: int
    layers: int
    vocabulary: int


@cache
def shape(name: str) -> Shape:
    """The shape of a model of `CONFIGS`, counted on the meta device."""
    return shape_of(name, CONFIGS[name])


def shape_of(name: str, config: PreTrainedConfig) -> Shape:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        # DeepSpeed's own count tells parameters apart by address, and on the meta device all have one
        parameters, (_, largest) = sum(p.numel() for p in model.parameters()), model_to_params(model)
        adapted = get_peft_model(model, LORA)
    return Shape(
        name=name,
        parameters=parameters,
        adapter=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        largest_layer=largest,
        width=config.hidden_size,
        inner=config.intermediate_size,
        key_value=config.hidden_size // config.num_attention_heads * config.num_key_value_heads,
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
    )


# ----------------------------------------------------------------------------------------------------- model states


def model_states(trained: int, largest_layer: int, stage: str, gpus: int) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer states a GPU, and a machine's host (0 without offload).

    P trained parameters on N GPUs: stage 2 has 2 P + 18 P / N (bf16 weights; bf16 and fp32 gradients, fp32 master
    weights, two Adam moments), stage 3 has 18 P / N + 4 times the layer that it gathers, both as DeepSpeed estimates.
    Stage 0 is its stage 2 on one GPU, 20 P. Stage 1 is ours: gradients stay whole, 4 P + 16 P / N.
    """
    nodes, on_node = -(-gpus // GPUS_PER_NODE), min(gpus, GPUS_PER_NODE)
    if stage == "0":
        return estimate_zero2_model_states_mem_needs(trained, 1, 1, cpu_offload=False)[1], 0
    if stage == "1":
        return 4 * trained + 16 * trained // gpus, 0
    if stage == "2":
        return estimate_zero2_model_states_mem_needs(trained, on_node, nodes, cpu_offload=False)[1], 0
    offload = stage == "3, offload"
    host, gpu, _ = estimate_zero3_model_states_mem_needs(
        trained, largest_layer, on_node, nodes, cpu_offload=offload, cpu_offload_params=offload
    )
    return gpu, host if offload else 0


def frozen_weights(parameters: int, stage: str, gpus: int) -> tuple[int, int]:
    """Bytes of bf16 weights that are only read, a GPU and a host: whole, divided by ZeRO-3, or on the host.

    TRL runs a reference under ZeRO-3 where the policy is, and otherwise gives every GPU the whole of it.
    """
    if stage == "3":
        return 2 * parameters // gpus, 0
    if stage == "3, offload":
        return 0, 2 * parameters // -(-gpus // GPUS_PER_NODE)
    return 2 * parameters, 0


def states(model: Shape, method: str, stage: str, gpus: int) -> tuple[int, int]:
    """Bytes of policy and reference a GPU and a host.

    Args:
        method: `full` (with a frozen copy as the reference), `full, no copy` (reference log-probs precomputed), or
            `LoRA` (the reference is the base with the adapter off: no bytes of its own).
    """
    lora = method == "LoRA"
    trained = model.adapter if lora else model.parameters
    parts = [model_states(trained, model.largest_layer, stage, gpus)]
    if method in ("full", "LoRA"):  # the reference's copy, or the base under the adapter
        parts.append(frozen_weights(model.parameters, stage, gpus))
    return sum(gpu for gpu, _ in parts), sum(host for _, host in parts)


# ------------------------------------------------------------------------------------------------------ activations


def layer_bytes(model: Shape) -> int:
    """Bytes that the backward pass keeps of a token in one layer, bf16: 20 h + 4 k + 8 f.

    h width, k width of the keys, f of the MLP. Two RMSNorms keep their input in fp32 and its normalised form (6 h
    each) and their output (2 h each); attention keeps queries and output (4 h), keys and values (4 k); the MLP its
    gate, the gate's activation, the other half and their product (8 f). Scores of attention are not kept (fused
    attention, arXiv 2205.14135). LoRA keeps the same but for r numbers a matrix.
    """
    return 20 * model.width + 4 * model.key_value + 8 * model.inner


def activations(model: Shape, tokens: int, *, checkpointing: bool) -> int:
    """Bytes of `tokens` positions on one GPU.

    Without checkpointing L · layer_bytes; with it every layer's input and one layer while it is computed again,
    2 h L + layer_bytes (arXiv 1604.06174 with a layer as the segment); and the last norm, 8 h.
    """
    kept = 2 * model.width * model.layers + layer_bytes(model) if checkpointing else model.layers * layer_bytes(model)
    return tokens * (kept + 8 * model.width)


def cache_bytes(model: Shape) -> int:
    """Bytes of keys and values of a token while decoding, bf16: 4 k a layer."""
    return 4 * model.key_value * model.layers


def whole_logits(model: Shape, tokens: int) -> int:
    """Bytes of logits that exist at once without a fused head: bf16, fp32, and the fp32 gradient, 10 V a token."""
    return 10 * model.vocabulary * tokens


def fused_head(model: Shape, tokens: int, *, trained: bool) -> int:
    """Bytes of TRL's fused head: one bf16 tile of logits, the fp32 gradient of its input, and that of a trained head.

    2 · min(T, 4096) · min(V, 32768) + 4 h T (+ 4 h V), with TRL's tile.
    """
    tile = 2 * min(tokens, TOKEN_CHUNK_SIZE) * min(model.vocabulary, _CHUNKED_LOGPROB_CHUNK_SIZE)
    return tile + 4 * model.width * tokens + (4 * model.width * model.vocabulary if trained else 0)


def step_bytes(model: Shape, method: str, length: int) -> int:
    """Bytes of a step on one preference pair of `length` tokens a side, checkpointed, with the fused head."""
    tokens = ROWS * length
    head = fused_head(model, tokens, trained=method != "LoRA")
    return activations(model, tokens, checkpointing=True) + head


# ------------------------------------------------------------------------------------------------------- what fits


@dataclass(frozen=True)
class Limits:
    """Bytes that a GPU has for all of this, and a machine's host for what is offloaded."""

    gpu: float
    host: float


def fits(limits: Limits, model: Shape, method: str, stage: str, gpus: int, length: int) -> bool:
    """Whether states and one pair's step fit."""
    gpu, host = states(model, method, stage, gpus)
    return gpu + step_bytes(model, method, length) <= limits.gpu and host <= limits.host


def smallest(limits: Limits, model: Shape, method: str, gpus: int, length: int) -> str:
    """The first stage that fits: each one after it shares out more and communicates more."""
    return next((stage for stage in STAGES if fits(limits, model, method, stage, gpus, length)), "**none**")


def gb(value: float) -> str:
    return f"{value / GB:,.1f}" if value < 100 * GB else f"{value / GB:,.0f}"


def memory_rows(limits: Limits, model: Shape) -> list[list[str]]:
    """By method and stage: states by GPUs, and with a step of each length; struck out where it does not fit."""
    rows = []
    for method, title in METHODS.items():
        for stage in STAGES:
            cells = [gb(states(model, method, stage, gpus)[0]) for gpus in GPUS]
            for length in LENGTHS:
                for gpus in GPUS:
                    total = gb(states(model, method, stage, gpus)[0] + step_bytes(model, method, length))
                    cells.append(total if fits(limits, model, method, stage, gpus, length) else f"~~{total}~~")
            host = states(model, method, stage, GPUS[0])[1]
            rows.append([title, stage, *cells, gb(host) if host else ""])
    return rows


def step_rows(model: Shape) -> list[list[str]]:
    """By length: activations of a pair kept and checkpointed, and the head as whole logits and fused."""
    rows = []
    for length in LENGTHS:
        tokens = ROWS * length
        kept, checkpointed = (activations(model, tokens, checkpointing=on) for on in (False, True))
        whole = whole_logits(model, tokens)
        fused = [gb(fused_head(model, tokens, trained=on)) for on in (True, False)]
        share = f"{whole / (checkpointed + whole):.0%}"
        rows.append([model.name, f"{length // 1024}k", gb(kept), gb(checkpointed), gb(whole), share, *fused])
    return rows
