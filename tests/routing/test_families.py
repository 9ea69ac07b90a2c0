"""Families of models in the batch of routed decoding, each against `generate` for every prompt alone."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from tests.support import tiny_model, tiny_tokenizer
from tokalign.generation.protocol import SamplingParams
from tokalign.routing.decode.generator import RoutedGenerator
from tokalign.routing.decode.policies import AlwaysLLM, NeverLLM
from tokalign.routing.decode.slots import check_model
from tokalign.routing.router.model import TokenRouter, TokenRouterConfig
from tokalign.stage.hashes import weights_hash

TOKENIZER = tiny_tokenizer()
SIZES = dict(
    vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    max_position_embeddings=512,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LATENT = dict(
    kv_lora_rank=8, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, first_k_dense_replace=1,
    n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=32, head_dim=4,
    num_key_value_heads=4,
)  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
}  # fmt: skip
FAMILIES = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {}),
    "qwen3 moe": (hf.Qwen3MoeConfig, hf.Qwen3MoeForCausalLM, EXPERTS),
    "phi3 longrope": (
        hf.Phi3Config,
        hf.Phi3ForCausalLM,
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40},  # which its configuration asks for apart
    ),
    "mistral window": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": 7}),
    "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM, {"sliding_window": 7}),
    "gemma3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, {"sliding_window": 7}),
    "gpt-oss sinks": (hf.GptOssConfig, hf.GptOssForCausalLM, {"sliding_window": 7, "num_local_experts": 4}),
    "deepseek latent": (hf.DeepseekV3Config, hf.DeepseekV3ForCausalLM, LATENT),
    "llama4 chunks": (
        hf.Llama4TextConfig,
        hf.Llama4ForCausalLM,
        {"attention_chunk_size": 16, "floor_scale": 4, "num_local_experts": 2, "intermediate_size_mlp": 64},
    ),
}


def model_of(name: str):
    config, kind, extra = FAMILIES[name]
    torch.manual_seed(0)
    model = kind(config(**{**SIZES, **extra})).eval()
    model.generation_config.eos_token_id = None
    return model


def alone(model, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=new, do_sample=False)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_each_row_of_a_batch_is_as_generate_alone(name):
    model, draw = model_of(name), random.Random(0)
    # Of longrope one row stays short, one crosses the switch at 40 tokens, one starts beyond it
    prompts = [[draw.randrange(6, 60) for _ in range(count)] for count in (3, 30, 60, 9)]
    generator = RoutedGenerator(model, tiny_model(len(TOKENIZER)), TOKENIZER, NeverLLM())
    generator.end_ids = [set(), set()]
    got = generator.generate(prompts, SamplingParams(temperature=0, max_tokens=16))
    for prompt, (completion,) in zip(prompts, got, strict=True):
        assert completion.token_ids == alone(model, prompt, 16)


def test_a_model_with_an_adapter_in_memory_is_run_with_it():
    base = model_of("llama")
    plain = [alone(base, [7, 8, 9], 12), alone(base, [20] * 5, 12)]
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"])).eval()
    generator = RoutedGenerator(tiny_model(len(TOKENIZER)), model, TOKENIZER, AlwaysLLM())
    generator.end_ids = [set(), set()]
    got = generator.generate([[7, 8, 9], [20] * 5], SamplingParams(temperature=0, max_tokens=12))
    written = [completion.token_ids for (completion,) in got]
    assert written == [alone(model, [7, 8, 9], 12), alone(model, [20] * 5, 12)] != plain


def test_an_adapter_folder_is_a_model_of_a_pair(tmp_path):
    slm, llm = (str(tmp_path / name) for name in ("slm", "llm"))
    for seed, folder in enumerate((slm, llm)):
        tiny_model(len(TOKENIZER), seed=seed).save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
    adapters = []
    for folder in (slm, llm):
        base = hf.AutoModelForCausalLM.from_pretrained(folder)
        adapted = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])).eval()
        adapted.save_pretrained(f"{folder}_adapter")
        adapters.append(adapted)
    given = [f"{folder}_adapter" for folder in (slm, llm)]
    router = TokenRouter(
        TokenRouterConfig(
            hidden_size=32, embedding_size=32, shared_vocab=len(TOKENIZER), top_k=8, width=16, num_blocks=1,
            threshold=0.0, slm={"name": given[0], "weights_hash": weights_hash(given[0])},
        )
    )  # fmt: skip
    router.save_pretrained(tmp_path / "router")
    pair = RoutedGenerator.from_pretrained(*given, str(tmp_path / "router"))
    pair.end_ids = [set(), set()]
    params = SamplingParams(temperature=0, max_tokens=8)
    adapters[1].generation_config.eos_token_id = None
    assert pair.generate([[7, 8, 9]], params)[0][0].token_ids == alone(adapters[1], [7, 8, 9], 8)
    with pytest.raises(ValueError, match="was trained on another SLM"):
        RoutedGenerator.from_pretrained(slm, given[1], str(tmp_path / "router"))


def test_what_a_family_takes_from_elsewhere_is_noticed_when_the_model_is_loaded(monkeypatch):
    model = get_peft_model(model_of("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="is a learned prompt"):
        check_model(model)
    with pytest.raises(ValueError, match="computes its attention in its own code"):
        check_model(hf.GPTJForCausalLM(hf.GPTJConfig(vocab_size=60, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)))
    model = model_of("llama")
    rotary = model.model.rotary_emb
    forward = rotary.forward  # a family that counts positions itself
    monkeypatch.setattr(rotary, "forward", lambda x, position_ids: forward(x, torch.arange(x.shape[1])[None]))
    with pytest.raises(ValueError, match="gives other logits for a row beside another than alone"):
        check_model(model)
