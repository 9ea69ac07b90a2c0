"""The other half of generation, which reads completions instead of writing them: what a model says of given tokens.

Token signals, routing labels and evaluation score by it. It holds one base in memory with adapters on it, forms batches
by a token budget, and gives log-probabilities and entropies of the completion tokens.

The LM head sees completion positions only. A revision prompt, or a few-shot one, is several times as long as its
completion, and with 128 k words the head of a small model costs more than its layers. (TRL's fused head meets every
position of a batch where there is no Triton.) The head runs as a module, in tiles of a few positions and the whole
vocabulary, so adapters on it, quantised and offloaded heads need no code of their own, and no tensor of rows × tokens ×
vocabulary exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel, PeftModelForCausalLM
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tokalign.generation.adapters import adapter_config
from tokalign.stage.batching import batches_by_length
from tokalign.stage.processes import model_device

ACCELERATOR_TILE_BYTES = 512 << 20  # an accelerator needs enough positions in one matrix product to be busy
# fp32 logits of one tile. A matrix product reads and packs the whole head again for each tile, so a tile should hold
# hundreds of positions: 256 of 128 k words.
CPU_LOGITS_BYTES = 128 << 20


def _logit_transform(config) -> tuple[float, float | None]:
    """(scale, soft cap) that the model applies to its LM head's output; config names as in TRL's fused LM head."""
    # Families of models scale their logits by a factor, by a divisor, or by a factor under the divisor's name.
    text_config = config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(text_config, name, None)
        if scale is not None:
            break
    else:
        divisor = getattr(text_config, "logits_scaling", None)
        scale = 1.0
        if divisor is not None:
            scale = divisor if text_config.model_type == "hyperclovax" else 1 / divisor
    return float(scale), getattr(text_config, "final_logit_softcapping", None)


def _load_adapters(base: PreTrainedModel, adapters: dict[str, str], base_name: str) -> PeftModel:
    """One PeftModel over `base` holding each named adapter, refusing an adapter of another base.

    The recorded base must be this one by path, weights hash or name (`adapter_config`), and, since PEFT loads what fits
    and skips the rest, every weight of the adapter must have found its module.
    """
    model: PeftModel | None = None
    for name, path in adapters.items():
        config = adapter_config(path, base_name)
        config.inference_mode = True
        refusal = f"The {name} adapter {path} does not fit {base_name}: use it with the base that it was trained on"
        try:
            # autocast_adapter_dtype=False: a bf16 base is scored in bf16 throughout, as after merging
            if model is None:
                model = PeftModelForCausalLM(base, config, adapter_name=name, autocast_adapter_dtype=False)
            loaded = model.load_adapter(path, name, autocast_adapter_dtype=False)
        except (RuntimeError, ValueError) as error:  # PEFT: size mismatch; target modules not found
            raise ValueError(f"{refusal} ({str(error).strip().splitlines()[-1].strip()}).") from error
        if loaded.missing_keys or loaded.unexpected_keys:
            raise ValueError(f"{refusal} (no match for {(loaded.missing_keys + loaded.unexpected_keys)[0]}).")
    assert model is not None
    return model.eval()


class CompletionScorer:
    """One base in memory, with adapters to be switched on in turn.

    Args:
        model: path, hub id, or a loaded causal LM, which then receives the adapters. Sharded scoring is data parallel:
            each accelerate process holds the base; a base too large for one device takes `device_map="auto"`.
        tokenizer: the model's tokenizer; only its pad id is used.
        adapters: PEFT adapter paths by name.
        token_budget: tokens of one forward pass, padding included; a longer row goes alone.
        tile_bytes: bound on the fp32 logits that exist at a time; default by device.
        dtype: of a model given by path ("auto": as stored).

    Raises:
        ValueError: an adapter of another base, or a model whose way from hidden states to logits is not known here.
    """

    tile_default = CPU_LOGITS_BYTES  # on a CPU

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        adapters: Mapping[str, str | Path],
        *,
        token_budget: int = 4096,
        tile_bytes: int | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: str | None = None,
    ):
        self.token_budget = token_budget
        if isinstance(model, PreTrainedModel):
            self.base = model
        else:
            self.base = AutoModelForCausalLM.from_pretrained(
                str(model), dtype=dtype, device_map=device_map or model_device()
            )
        self.base.eval()
        # The embedding is where ids enter: its device takes the inputs, its rows bound the ids.
        embedding = next(self.base.get_input_embeddings().parameters())
        self.device, self.vocabulary = embedding.device, embedding.shape[0]
        self.pad_id = getattr(tokenizer, "pad_token_id", None) or 0
        base_name = str(self.base.config.name_or_path or type(self.base).__name__)
        paths = {name: str(path) for name, path in adapters.items()}
        self.model = _load_adapters(self.base, paths, base_name) if paths else None

        # Looked up after PEFT, which replaces modules that an adapter targets
        self.head = self.base.get_output_embeddings()
        self.scale, self.softcap = _logit_transform(self.base.config)
        weight = next(self.head.parameters())
        # Weights that accelerate keeps elsewhere and fetches on use are "meta"; its hooks also move the input
        self.head_device = self.device if weight.device.type == "meta" else weight.device
        on_cpu = self.head_device.type == "cpu"
        self.tile_bytes = tile_bytes or (self.tile_default if on_cpu else ACCELERATOR_TILE_BYTES)
        self.max_length = getattr(self.base.config.get_text_config(), "max_position_embeddings", None)
        for name in (None, *paths):
            self._check_head(name)

    @contextmanager
    def _active(self, name: str | None) -> Iterator[None]:
        """The adapter `name`, or for None the base itself."""
        if self.model is None:
            yield
        elif name is None:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(name, inference_mode=True)
            yield

    def _hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.base.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits (P, V) of hidden states (P, D) as the model itself computes them; the caller may change them."""
        return self._transform(self.head(hidden))

    def _transform(self, logits: torch.Tensor) -> torch.Tensor:
        """fp32 logits from the head's output, which may be overwritten."""
        logits = logits.float()
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    @torch.inference_mode()
    def _check_head(self, name: str | None) -> None:
        """Compares with the model's own logits once: a head this class does not know is refused, never misread."""
        ids = torch.arange(min(8, self.vocabulary), device=self.device)[None]
        with self._active(name):
            expected = self.base(input_ids=ids, use_cache=False).logits[0].float()
            actual = self._logits(self._hidden(ids)[0].to(self.head_device))
        error = (actual - expected.to(actual.device)).abs().max().item()
        tolerance = 1e-3 if next(self.head.parameters()).dtype == torch.float32 else 0.05
        if not error <= tolerance * max(1.0, expected.abs().max().item()):
            raise ValueError(
                f"{type(self.base).__name__} (model_type {self.base.config.model_type!r}) turns hidden states into "
                f"logits in a way {type(self).__name__} does not know (difference {error:.3g}): use another model."
            )

    def _problem(self, prompt_length: int, completion_length: int) -> str | None:
        """Why a row is to be dropped (the same words for all such rows, so that they can be counted), or None."""
        if not completion_length:
            return "the completion is empty"
        if not prompt_length:
            return "the prompt is empty, so nothing predicts the first completion token"
        if self.max_length is not None and prompt_length + completion_length > self.max_length:
            return f"prompt and completion are longer than the model's {self.max_length} positions"
        return None

    def _check_rows(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], names: Sequence[str] | None
    ) -> list[str]:
        """What to call the rows; ValueError for one that cannot be scored."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions: pass one prompt each.")
        labels = list(names) if names is not None else [str(i) for i in range(len(prompts))]
        for label, prompt, completion in zip(labels, prompts, completions, strict=True):
            if (reason := self._problem(len(prompt), len(completion))) is not None:
                raise ValueError(f"Row {label}: {reason}; drop the row or shorten it.")
            low, high = min(*prompt, *completion), max(*prompt, *completion)
            if low < 0 or high >= self.vocabulary:
                raise ValueError(
                    f"Row {label}: token id {low if low < 0 else high} is outside the model's vocabulary of "
                    f"{self.vocabulary}; use the tokenizer of this model."
                )
        return labels

    @staticmethod
    def _check_finite(values: torch.Tensor, label: str) -> None:
        """ValueError for numbers (T,) of one completion's tokens that are not finite."""
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            raise ValueError(
                f"Row {label}: the log-probability of completion token {int(bad[0])} is not finite; check the model's "
                "and the adapter's weights, or score in fp32."
            )

    def _batches(self, lengths: Sequence[int], copies: int = 1) -> Iterator[list[int]]:
        """Indices of the rows of each forward pass."""
        return batches_by_length(lengths, self.token_budget, copies)

    def _pad(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids (B, L) padded on the right, the positions (B, L) whose next token is scored, and these tokens (P,)."""
        width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        # The state at position t predicts token t + 1, so the positions that are scored begin one before the
        # completion.
        input_ids = torch.full((len(prompts), width), self.pad_id, dtype=torch.long)
        predicts = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            length = len(prompt) + len(completion)
            input_ids[row, :length] = torch.tensor([*prompt, *completion])
            predicts[row, len(prompt) - 1 : length - 1] = True
        return input_ids, predicts, input_ids[:, 1:][predicts[:, :-1]]

    def _states(self, input_ids: torch.Tensor, predicts: torch.Tensor) -> torch.Tensor:
        """Hidden states (P, D) at the positions `predicts`, where the LM head is.

        No attention mask: padding is on the right, where causal attention keeps it out of every scored position, and
        without a mask the fused causal kernels apply.
        """
        states = self._hidden(input_ids.to(self.device))
        return states[predicts.to(states.device)].to(self.head_device)

    @torch.inference_mode()
    def _logps(
        self,
        name: str | None,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        entropy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """log π(y_t|x, y_<t) and, if asked, the entropy of π(·|x, y_<t), in nats.

        Args:
            name: the adapter, or None for the base.

        Returns:
            fp32 tensors (P,) on the CPU: all rows' completion tokens, one row after the other.
        """
        input_ids, predicts, token_ids = self._pad(prompts, completions)
        with self._active(name):
            hidden = self._states(input_ids, predicts)
            token_ids = token_ids.to(self.head_device)
            # The head meets a few positions at a time: fp32 logits of a whole batch over a large vocabulary are tens of
            # GB. Each logit is 4 bytes, and the entropy needs a second tile of the same size for the probabilities.
            step = max(1, self.tile_bytes // ((8 if entropy else 4) * self.vocabulary))
            parts = [slice(start, start + step) for start in range(0, len(token_ids), step)]
            tiles = [_log_probs(self._logits(hidden[at]), token_ids[at], entropy) for at in parts]
        logps, entropies = zip(*tiles, strict=True)
        return torch.cat(logps).cpu(), torch.cat(entropies).cpu() if entropy else None


def _log_probs(
    logits: torch.Tensor, token_ids: torch.Tensor, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log-softmax at `token_ids` (P,) of fp32 `logits` (P, V), which are overwritten, and the entropy if asked."""
    # In place throughout, since the tile is the largest tensor there is. Without the maximum taken off, exp overflows.
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    chosen = logits.gather(-1, token_ids[:, None]).squeeze(-1)
    if not entropy:
        return chosen - logits.exp_().sum(dim=-1).log(), None
    weights = logits.exp()
    total = weights.sum(dim=-1)
    # −Σ p log p with p = e^z / Z
    return chosen - total.log(), total.log() - weights.mul_(logits).sum(dim=-1) / total
