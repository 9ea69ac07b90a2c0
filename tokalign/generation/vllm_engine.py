"""Generation with vLLM inside this process: token-id prompts, prefix cache, LoRA adapters by path.

Log-probs are vLLM's `raw_logprobs`: temperature 1, before bans and top-p. A ban is a logit bias of −inf, set on the
parameters object itself (the HTTP interface clips biases to ±100), so a banned id has probability exactly 0.

A request's `seed` fixes its completions here too (sample k uses seed + k), but through vLLM's own generator: sampled
ids differ from the transformers engine's, greedy ids agree.

A `json_schema` goes to vLLM's structured outputs. They read the vocabulary's entries as they stand, so a word-level
tokenizer is handed over spelled out (`tokalign.generation.constrained`); its prompts and completions are ids as ever.
vLLM masks before it takes log-probs: those of a constrained completion are over the allowed ids, not the model's own.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import tempfile
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from tokalign.generation.adapters import adapter_config
from tokalign.generation.arguments import EngineArguments
from tokalign.generation.constrained import check_llguidance, ebnf, needs_leading_space, refused, spelled_out
from tokalign.generation.protocol import (
    Completion,
    Ids,
    SamplingParams,
    check_prompts,
    generate_with_early_bans,
    params_of_each,
    repeat_greedy,
)

LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)  # what vLLM compiles for


class VLLMEngine:
    """`Engine` over `vllm.LLM`. One GPU (or `tensor_parallel_size`) a process."""

    tokenizer: PreTrainedTokenizerBase

    def __init__(self, arguments: EngineArguments):
        if importlib.util.find_spec("vllm") is None:
            raise ImportError("engine=vllm needs vLLM: install tokalign[vllm], or use engine=transformers.")
        import torch
        from vllm import LLM

        from tokalign.internals.vllm import model_config_of

        self.arguments = arguments
        options: dict[str, Any] = {
            "gpu_memory_utilization": arguments.gpu_memory_utilization,
            "enforce_eager": arguments.enforce_eager,
            "max_model_len": arguments.max_model_len,
        }
        if not torch.cuda.is_available():
            # vLLM's CPU backend refuses its own default share and compiles for minutes; and a seeded request whose
            # prefill is split ends it ("CPU Generator does not use offset", vLLM 0.30).
            options["enable_chunked_prefill"] = False
            for name, value in {"gpu_memory_utilization": 0.3, "enforce_eager": True}.items():
                options[name] = value if options[name] is None else options[name]
        if arguments.max_lora_rank:
            rank = next((r for r in LORA_RANKS if r >= arguments.max_lora_rank), arguments.max_lora_rank)
            options |= {"enable_lora": True, "max_lora_rank": rank}
        name = arguments.tokenizer or arguments.model
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
        self._spelled = tempfile.TemporaryDirectory(prefix="tokalign-tokenizer-")
        spelled = spelled_out(self.tokenizer, self._spelled.name)
        if spelled:  # vLLM looks for a configuration beside a tokenizer
            AutoConfig.from_pretrained(arguments.model, trust_remote_code=arguments.trust_remote_code).save_pretrained(
                self._spelled.name
            )
        self._llm = LLM(
            model=arguments.model,
            tokenizer=self._spelled.name if spelled else name,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
            tensor_parallel_size=arguments.tensor_parallel_size,
            logprobs_mode="raw_logprobs",
            enable_prefix_caching=True,
            structured_outputs_config={"backend": arguments.grammar_backend.removeprefix("ll")},
            **{name: value for name, value in options.items() if value is not None},
        )
        self._leading_space = needs_leading_space(self.tokenizer)
        config = model_config_of(self._llm)
        self.vocab_size: int = config.get_vocab_size()
        self.max_length: int = config.max_model_len
        self._adapters: dict[str, Any] = {}

    def generate(
        self,
        prompts: Sequence[Ids],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapter: str | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`."""
        each = params_of_each(params, len(prompts))
        check_prompts(prompts, self.vocab_size, self.max_length, each)
        lora = self._lora(adapter or self.arguments.adapter)

        def run(prompts: Sequence[Ids], each: Sequence[SamplingParams]) -> list[list[Completion]]:
            return self._run(prompts, each, lora)

        return generate_with_early_bans(run, prompts, each)

    def close(self) -> None:
        """Stop the engine's worker processes."""
        from tokalign.internals.vllm import shut_down

        shut_down(self._llm)
        self._spelled.cleanup()

    def _run(self, prompts: Sequence[Ids], each: Sequence[SamplingParams], lora: Any) -> list[list[Completion]]:
        from vllm import SamplingParams as VLLMParams
        from vllm import TokensPrompt

        from tokalign.internals.vllm import VLLMValidationError

        sampling = [
            VLLMParams(
                n=p.draws,
                temperature=p.temperature,
                top_p=p.top_p,
                **p.vllm_options,
                max_tokens=p.max_tokens,
                seed=secrets.randbits(62) if p.seed is None else p.seed % 2**62,
                stop=list(p.stop),
                stop_token_ids=list(p.stop_token_ids),
                logit_bias=dict.fromkeys(p.banned_token_ids, float("-inf")) or None,
                structured_outputs=self._structure(p.json_schema, row),
                logprobs=0,
                detokenize=bool(p.stop),
                skip_special_tokens=False,
            )
            for row, p in enumerate(each)
        ]
        try:
            outputs: Any = self._llm.generate(
                [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
                sampling,
                lora_request=lora,
                use_tqdm=False,
            )
        except VLLMValidationError as error:
            if all(p.json_schema is None for p in each):
                raise
            raise ValueError(
                f"vLLM refused a json_schema ({' '.join(str(error).split())[:300]}): correct it, or try the other "
                "grammar_backend."
            ) from error
        results = [
            [
                Completion(
                    list(one.token_ids),
                    [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)],
                    one.finish_reason,
                )
                for one in sorted(output.outputs, key=lambda one: one.index)
            ]
            for output in outputs
        ]
        return repeat_greedy(results, each)

    def _structure(self, schema: str | None, prompt: int) -> Any:
        from vllm.sampling_params import StructuredOutputsParams

        if schema is None:
            return None
        if self.arguments.grammar_backend == "llguidance":
            check_llguidance(self.tokenizer)
        if not self._leading_space:
            return StructuredOutputsParams(json=schema)
        try:
            return StructuredOutputsParams(grammar=ebnf(schema, leading_space=True))
        except RuntimeError as error:
            raise refused(prompt, error) from error

    def _lora(self, path: str | None) -> Any:
        from vllm.lora.request import LoRARequest

        if path is None:
            return None
        if path not in self._adapters:
            rank = getattr(adapter_config(path, self.arguments.model), "r", 0)
            if rank > self.arguments.max_lora_rank:
                raise ValueError(
                    f"Adapter {path} has rank {rank} but the engine takes {self.arguments.max_lora_rank}: "
                    f"start it with --max_lora_rank {rank}."
                )
            number = len(self._adapters) + 1
            local = path if os.path.isdir(path) else _download(path)
            self._adapters[path] = LoRARequest(f"adapter_{number}", number, local)
        return self._adapters[path]


def _download(repository: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(repository)
