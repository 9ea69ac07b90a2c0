"""Contrastive estimation of critical tokens (critical-token DPO, arXiv 2411.19943v3, section 3.2).

Two adapters of one base, tuned on correct (positive) and on incorrect (negative) trajectories, read one completion:

    log s_t = (1 + β) log P_p(y_t|·) − β log P_n(y_t|·) − log Z_t,    Z_t = Σ_v P_p(v)^(1+β) / P_n(v)^β.

Each model's own normaliser cancels against Z_t, so this is softmax((1 + β)·l_p − β·l_n) of the two models' logits at
the token y_t. A low s_t marks a likely critical token. The cost is two forward passes a completion.

Deviations from the released code, which keeps two merged models and the softmax over the whole vocabulary: one base in
memory with the two adapters switched on in turn; the vocabulary is met only in tiles, at completion positions; where
the LM head is one linear map that no adapter touches and nothing caps its output, the contrast is taken before it,
(1 + β) W h_p − β W h_n = W((1 + β) h_p − β h_n), which halves the head's work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel, PeftModelForCausalLM
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tokalign.generation.protocol import adapter_config
from tokalign.jobs import process_state

# A tile's logits, exponentials included. On a CPU a small tile stays near the cache and its pages are reused; an
# accelerator needs enough positions in one matrix product to be busy.
CPU_TILE_BYTES = 8 << 20
ACCELERATOR_TILE_BYTES = 512 << 20
SMALLEST_BLOCK = 2048  # words of the vocabulary in one matrix product


def _softmax_at(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Probability of `token_ids` (P,) under fp32 `logits` (P, V), which are overwritten. Non-finite rows give NaN."""
    logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
    return logits.gather(-1, token_ids[:, None]).squeeze(-1) / logits.sum(dim=-1)


def _check_beta(beta: float) -> None:
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta must be a finite number >= 0, got {beta}.")


@torch.no_grad()
def contrastive_score(
    positive_logits: torch.Tensor,
    negative_logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    beta: float = 1.0,
    tile_bytes: int = CPU_TILE_BYTES,
) -> torch.Tensor:
    """Contrastive score s_t of each token (arXiv 2411.19943v3, eq. for log s_t; see the module docstring).

    Args:
        positive_logits: (B, T, V) logits that predict `token_ids`; any float dtype, strided views welcome.
        negative_logits: (B, T, V), same vocabulary.
        token_ids: (B, T) token at each position, 0 <= id < V.
        beta: strength of the contrast, >= 0; 0 gives the positive model's own probability.
        tile_bytes: bound on the fp32 working memory; the logits are neither copied whole nor changed.

    Returns:
        (B, T) fp32 scores in [0, 1].

    Raises:
        ValueError: shapes disagree, an id is outside the vocabulary, or a position's logits are NaN or infinite.
    """
    _check_beta(beta)
    if positive_logits.ndim != 3 or positive_logits.shape != negative_logits.shape:
        raise ValueError(
            "positive_logits and negative_logits must both be (B, T, V) over one vocabulary, got "
            f"{tuple(positive_logits.shape)} and {tuple(negative_logits.shape)}."
        )
    if token_ids.shape != positive_logits.shape[:-1]:
        raise ValueError(
            f"token_ids must be {tuple(positive_logits.shape[:-1])} to match the logits, got {tuple(token_ids.shape)}."
        )
    batch, length, vocabulary = positive_logits.shape
    outside = (token_ids < 0) | (token_ids >= vocabulary)
    if outside.any():
        raise ValueError(f"token_ids must be in [0, {vocabulary}), got {int(token_ids[outside][0])}.")

    scores = torch.empty(batch, length, dtype=torch.float32, device=positive_logits.device)
    step = max(1, tile_bytes // (4 * vocabulary))
    for row in range(batch):  # row by row, because a view over (B, T) of a shifted slice would be a copy
        for start in range(0, length, step):
            at = slice(start, start + step)
            tile = positive_logits[row, at].to(torch.float32, copy=True).mul_(1 + beta)
            tile.sub_(negative_logits[row, at], alpha=beta)
            scores[row, at] = _softmax_at(tile, token_ids[row, at])
    bad = scores.isnan().nonzero()
    if len(bad):
        row, position = bad[0].tolist()
        raise ValueError(
            f"The combined logits of row {row}, position {position} are not finite: "
            "look for NaN or infinity in the models' weights or an overflow in half precision."
        )
    return scores


def _logit_transform(config) -> tuple[float, float | None]:
    """(scale, soft cap) that the model applies to its LM head's output; config names as in TRL's fused LM head."""
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


def _device() -> torch.device:
    # cpu=True where there is no accelerator: without it accelerate takes several CPU processes for one
    return process_state().device


class ContrastiveScorer:
    """Scores completions with one base in memory and two adapters on it.

    Args:
        model: path, hub id, or a loaded causal LM, which then receives the adapters. Sharded scoring is data parallel:
            each accelerate process holds the base; a base too large for one device takes `device_map="auto"`.
        tokenizer: the models' tokenizer; only its pad id is used.
        positive, negative: PEFT adapter paths, or None for the base itself.
        beta: β of the estimate.
        token_budget: tokens of one forward pass, padding included; a longer row goes alone.
        tile_bytes: bound on the working memory at the LM head; default by device.
        dtype: of a model given by path ("auto": as stored).

    Raises:
        ValueError: an adapter of another base, or a model whose way from hidden states to logits is not known here.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        positive: str | None,
        negative: str | None,
        *,
        beta: float = 1.0,
        token_budget: int = 4096,
        tile_bytes: int | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: str | None = None,
    ):
        _check_beta(beta)
        self.beta = beta
        self.token_budget = token_budget
        if isinstance(model, PreTrainedModel):
            self.base = model
        else:
            self.base = AutoModelForCausalLM.from_pretrained(
                str(model), dtype=dtype, device_map=device_map or _device()
            )
        self.base.eval()
        embedding = next(self.base.get_input_embeddings().parameters())
        self.device, self.vocabulary = embedding.device, embedding.shape[0]
        self.pad_id = getattr(tokenizer, "pad_token_id", None) or 0
        adapters = {
            name: str(path) for name, path in (("positive", positive), ("negative", negative)) if path is not None
        }
        base_name = str(self.base.config._name_or_path or type(self.base).__name__)
        self.model = _load_adapters(self.base, adapters, base_name) if adapters else None
        self.names = tuple(name if name in adapters else None for name in ("positive", "negative"))

        # Looked up after PEFT, which replaces modules that an adapter targets
        self.head = self.base.get_output_embeddings()
        self.scale, self.softcap = _logit_transform(self.base.config)
        weight = next(self.head.parameters())
        # Weights that accelerate keeps elsewhere and fetches on use are "meta"; its hooks also move the input
        offloaded = weight.device.type == "meta"
        self.head_device = self.device if offloaded else weight.device
        # A head that an adapter targets is wrapped by PEFT, a quantised one has a class of its own
        self.plain_head = type(self.head) is nn.Linear and not offloaded
        self.max_length = getattr(self.base.config.get_text_config(), "max_position_embeddings", None)
        self.tile_bytes = tile_bytes or (CPU_TILE_BYTES if self.head_device.type == "cpu" else ACCELERATOR_TILE_BYTES)
        self._check_head()

    @contextmanager
    def _active(self, name: str | None) -> Iterator[None]:
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
        """fp32 logits (P, V) of hidden states (P, D) as the model itself computes them."""
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
    def _check_head(self) -> None:
        """Compares with the model's own logits once: a head this class does not know is refused, never misread."""
        ids = torch.arange(min(8, self.vocabulary), device=self.device)[None]
        for name in self.names:
            with self._active(name):
                expected = self.base(input_ids=ids, use_cache=False).logits[0].float()
                actual = self._logits(self._hidden(ids)[0].to(self.head_device))
            error = (actual - expected.to(actual.device)).abs().max().item()
            tolerance = 1e-3 if next(self.head.parameters()).dtype == torch.float32 else 0.05
            if not error <= tolerance * max(1.0, expected.abs().max().item()):
                raise ValueError(
                    f"{type(self.base).__name__} (model_type {self.base.config.model_type!r}) turns hidden states into "
                    f"logits in a way ContrastiveScorer does not know (difference {error:.3g}): use contrastive_score "
                    "on the models' own logits."
                )

    def problem(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str | None:
        """Why a row is to be dropped (the same words for all such rows, so that they can be counted), or None."""
        if not len(completion_ids):
            return "the completion is empty"
        if not len(prompt_ids):
            return "the prompt is empty, so nothing predicts the first completion token"
        if self.max_length is not None and len(prompt_ids) + len(completion_ids) > self.max_length:
            return f"prompt and completion are longer than the model's {self.max_length} positions"
        return None

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        names: Sequence[str] | None = None,
    ) -> list[list[float]]:
        """Contrastive scores of completions.

        Args:
            prompts, completions: token ids, one pair a row.
            names: what to call the rows in errors; their index if absent.

        Returns:
            One list a row in the given order, one score in [0, 1] a completion token.

        Raises:
            ValueError: a row that `problem` refuses, or logits that are not finite.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions: pass one prompt each.")
        labels = list(names) if names is not None else [str(i) for i in range(len(prompts))]
        for label, prompt, completion in zip(labels, prompts, completions, strict=True):
            if (reason := self.problem(prompt, completion)) is not None:
                raise ValueError(f"Row {label}: {reason}; drop the row or shorten it.")
            low, high = min(*prompt, *completion), max(*prompt, *completion)
            if low < 0 or high >= self.vocabulary:
                raise ValueError(
                    f"Row {label}: token id {low if low < 0 else high} is outside the model's vocabulary of "
                    f"{self.vocabulary}; use the tokenizer of this model."
                )

        results: list[list[float]] = [[] for _ in prompts]
        for rows in self._batches([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]):
            scores = self._score_batch([prompts[r] for r in rows], [completions[r] for r in rows])
            for row, values in zip(rows, scores, strict=True):
                for position, value in enumerate(values):
                    if math.isnan(value):
                        raise ValueError(
                            f"Row {labels[row]}: the combined logits of completion token {position} are not finite; "
                            "check the adapters' weights or score in fp32."
                        )
                results[row] = values
        return results

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Row indices by falling length, so the first batch is the largest and memory trouble shows at once."""
        batch: list[int] = []
        for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
            if batch and (len(batch) + 1) * lengths[batch[0]] > self.token_budget:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    @torch.inference_mode()
    def _score_batch(self, prompts: list[Sequence[int]], completions: list[Sequence[int]]) -> list[list[float]]:
        width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        input_ids = torch.full((len(prompts), width), self.pad_id, dtype=torch.long)
        predicts = torch.zeros(len(prompts), width, dtype=torch.bool)  # positions whose next token is scored
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            length = len(prompt) + len(completion)
            input_ids[row, :length] = torch.tensor([*prompt, *completion])
            predicts[row, len(prompt) - 1 : length - 1] = True
        token_ids = input_ids[:, 1:][predicts[:, :-1]]

        # No attention mask: padding is on the right, where causal attention keeps it out of every scored position, and
        # without a mask the fused causal kernels apply.
        input_ids, predicts = input_ids.to(self.device), predicts.to(self.device)
        hidden = []
        for name in self.names:
            with self._active(name):
                states = self._hidden(input_ids)
                hidden.append(states[predicts.to(states.device)])
                del states
        flat = self._combine(hidden[0], hidden[1], token_ids)
        return [part.tolist() for part in flat.cpu().split([len(c) for c in completions])]

    def _combine(self, positive: torch.Tensor, negative: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """(P, D), (P, D), (P,) -> (P,) scores, of which no more than a tile meets the vocabulary at a time."""
        device = self.head_device
        positive, negative, token_ids = positive.to(device), negative.to(device), token_ids.to(device)
        # Bytes an entry of a tile: fp32 logits, twice where the models' are capped apart, and the head's own output
        # where it is in half precision
        entry = (4 if self.softcap is None else 8) + (0 if positive.dtype == torch.float32 else 2)
        if self.plain_head:
            step = max(1, self.tile_bytes // (entry * min(SMALLEST_BLOCK, self.vocabulary)))
            score = self._score_blocks
        else:
            step = max(1, self.tile_bytes // ((4 + entry) * self.vocabulary))
            score = self._score_whole
        parts = [slice(start, start + step) for start in range(0, len(token_ids), step)]
        return torch.cat([score(positive[at], negative[at], token_ids[at], entry) for at in parts])

    def _score_whole(
        self, positive: torch.Tensor, negative: torch.Tensor, token_ids: torch.Tensor, entry: int
    ) -> torch.Tensor:
        """Through the head as a module, which an adapter may have changed: few positions, the whole vocabulary."""
        with self._active(self.names[0]):
            tile = self._logits(positive).mul_(1 + self.beta)
        with self._active(self.names[1]):
            tile.sub_(self._logits(negative), alpha=self.beta)
        return _softmax_at(tile, token_ids)

    def _score_blocks(
        self, positive: torch.Tensor, negative: torch.Tensor, token_ids: torch.Tensor, entry: int
    ) -> torch.Tensor:
        """Through the head's weight, a block of the vocabulary for many positions, with a running normaliser.

        A matrix product over many positions reads and packs the large weight once for all of them: on a CPU that is
        twice as fast as tiles of few positions and the whole vocabulary, in the same memory.
        """
        if self.softcap is None:
            dtype = positive.dtype
            positive = positive.float().mul_(1 + self.beta).sub_(negative, alpha=self.beta).to(dtype)
        weight, bias = self.head.weight, self.head.bias
        block = max(1, self.tile_bytes // (entry * len(token_ids)))
        highest = positive.new_full((len(token_ids),), -torch.inf, dtype=torch.float32)
        total, chosen = torch.zeros_like(highest), torch.zeros_like(highest)
        for start in range(0, weight.shape[0], block):
            at = slice(start, start + block)
            part = weight[at], None if bias is None else bias[at]
            tile = self._transform(linear(positive, *part))
            if self.softcap is not None:
                tile.mul_(1 + self.beta).sub_(self._transform(linear(negative, *part)), alpha=self.beta)
            within = token_ids - start
            inside = (within >= 0) & (within < tile.shape[1])
            found = tile.gather(-1, within.clamp(0, tile.shape[1] - 1)[:, None]).squeeze(-1)
            chosen = torch.where(inside, found, chosen)
            before, highest = highest, torch.maximum(highest, tile.amax(dim=-1))
            total = total * (before - highest).exp() + tile.sub_(highest[:, None]).exp_().sum(dim=-1)
        return ((chosen - highest).exp() / total).clamp_(max=1.0)  # rounding can pass 1 by one unit
