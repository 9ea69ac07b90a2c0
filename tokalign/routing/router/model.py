"""The router (R2R, arXiv 2505.21600, section 3.3): would leaving this token to the small model (SLM) change the answer?

    x = [ h_t ; E(ŷ_t) ; W z_t ],   z_t = the k largest logits,   ŷ_t = their argmax,   E = the SLM's input embedding
    s_t = σ( head( LN( block_6( … block_1( W_in x ) ) ) ) ),      block(u) = u + W_2 drop(GELU(W_1 LN(u)))

Trained on labels "divergent" against "identical or neutral". A token goes to the large model if and only if
s_t >= threshold; the threshold is chosen on held-out responses (`tokalign.routing.router.calibration`) and stored in
the router's config. The baselines are `architecture="linear"` on the same inputs, and on the entropy alone.

A router is a folder with `config.json` and `model.safetensors`. The SLM's embedding is not saved with it: a decoder
attaches its own by reference, a trainer reads the rows it needs (`attach_embedding_of`).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from safetensors import safe_open
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, cached_file

from tokalign.internals.transformers import base_of, file_or_none, init
from tokalign.routing.labels.features import INPUTS, row_features
from tokalign.stage.hashes import weights_hash

_ROWS = 8192  # of the embedding, read at a time


@strict
class TokenRouterConfig(PreTrainedConfig):
    """Shape of a router, what it belongs to, and its threshold.

    Attributes:
        hidden_size: d, width of the SLM's hidden state.
        embedding_size: width of the SLM's input embedding; None is `hidden_size`.
        shared_vocab: ids that the SLM and the LLM share; logits of others are not read.
        top_k: logits that are read, the largest first.
        inputs: of "hidden", "token", "logits" and "entropy".
        architecture: "mlp" (the paper's) or "linear" (a logistic regression).
        width, expansion, num_blocks, dropout: of the MLP.
        threshold: route if and only if score >= threshold; None until calibrated.
        calibration: how the threshold was found: target, what it achieves, split, hash of the labels' manifest.
        slm: the small model: `name`, `weights_hash`, `tokenizer_hash`.
        prompts: how the prompts of the labels were rendered (`tokalign.prompts.PromptRendering.record`).
        pos_weight: weight of divergent tokens in training. σ(logit − ln pos_weight) is a probability; σ(logit), the
            score, is not.
    """

    model_type = "token_router"

    hidden_size: int = 1536
    embedding_size: int | None = None
    shared_vocab: int = 151936
    top_k: int = 100
    inputs: list[str] | tuple[str, ...] = ("hidden", "token", "logits")
    architecture: str = "mlp"
    width: int = 1024
    expansion: int = 4
    num_blocks: int = 6
    dropout: float | int = 0.1
    threshold: float | int | None = None
    calibration: dict[str, Any] | None = None
    slm: dict[str, Any] | None = None
    prompts: dict[str, Any] | None = None
    pos_weight: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if isinstance(self.inputs, tuple):  # as JSON has it
            self.inputs = list(self.inputs)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Called by `@strict` once the fields are set."""
        if not self.inputs or len(set(self.inputs)) < len(self.inputs) or not set(self.inputs) <= set(INPUTS):
            raise ValueError(f"`inputs` must be some of {', '.join(INPUTS)}, each once, got {list(self.inputs)}.")
        if self.architecture not in ("mlp", "linear"):
            raise ValueError(f"`architecture` must be 'mlp' or 'linear', got {self.architecture!r}.")
        for name in ("hidden_size", "embedding_size", "shared_vocab", "top_k", "width", "expansion", "num_blocks"):
            size, least = getattr(self, name), 0 if name == "num_blocks" else 1
            if type(size) is not int or size < least:  # @strict does not hold the fields to their types
                raise ValueError(f"`{name}` is {str(size)[:40]}: use a whole number, at least {least}.")
        if self.top_k > self.shared_vocab:
            raise ValueError(f"`top_k` is {self.top_k}: use 1 to {self.shared_vocab}, the shared ids.")

    def validate_threshold(self) -> None:
        """NaN compares with nothing: with it no token would ever be routed."""
        for name in ("threshold", "pos_weight", "dropout"):
            value = getattr(self, name)
            if value is not None and not _is_finite(value):
                raise ValueError(f"`{name}` is {value}: use a finite number.")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"`dropout` is {self.dropout}: use a share from 0 to 1.")

    def validate_origin(self) -> None:
        """`slm` and `calibration` are read by programs and shown to people, so they hold what was written."""
        slm = {} if self.slm is None else self.slm
        if not isinstance(slm, dict) or not all(value is None or _is_line(value) for value in slm.values()):
            raise ValueError("`slm` must hold texts of one line: `name`, `weights_hash` and `tokenizer_hash`.")
        if self.calibration is None:
            return
        target = self.calibration.get("target") if isinstance(self.calibration, dict) else None
        if not isinstance(target, dict) or not all(map(_is_line, [*target, self.calibration.get("split", "")])):
            raise ValueError("`calibration` must be an object with `target`, and with `split` of one line.")
        numbers, counted = list(target.values()), ("rate", "recall", "accuracy", "n_tokens", "n_responses")
        if "achieved" in self.calibration:
            achieved = self.calibration["achieved"]
            numbers += [achieved.get(name) for name in counted] if isinstance(achieved, dict) else [None]
        if not all(_is_finite(number) for number in numbers):
            raise ValueError(f"`calibration` must hold numbers: `target`, and `achieved` with {', '.join(counted)}.")


def _is_finite(value: Any) -> bool:
    # compared, since `math.isfinite` fails at an integer that no float holds
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()  # a lone surrogate is not


@dataclass
class RouterOutput(ModelOutput):
    """`logits` (N,): σ of them are the scores. `loss`: mean weighted cross-entropy in nats, where labels were given."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class RouterBlock(nn.Module):
    """u + W_2 drop(GELU(W_1 LN(u)))."""

    def __init__(self, width: int, expansion: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return u + self.down(self.dropout(nn.functional.gelu(self.up(self.norm(u)))))


class TokenRouter(PreTrainedModel):
    """Scores next tokens; see the module's docstring. N is the number of tokens, in any order.

    It has no threshold of its own accord: `threshold` is the calibrated one.
    """

    config_class = TokenRouterConfig
    config: TokenRouterConfig
    base_model_prefix = "router"
    main_input_name = "hidden"
    _no_split_modules = ["RouterBlock"]  # noqa: RUF012 (transformers' own kind of attribute)

    def __init__(self, config: TokenRouterConfig):
        super().__init__(config)
        assert config.embedding_size is not None
        linear = config.architecture == "linear"
        sizes = {
            "hidden": config.hidden_size,
            "token": config.embedding_size,
            "logits": config.top_k if linear else config.hidden_size,
            "entropy": 1,
        }
        total = sum(sizes[name] for name in config.inputs)
        if linear:
            self.head = nn.Linear(total, 1)
        else:
            if "logits" in config.inputs:
                self.project_logits = nn.Linear(config.top_k, config.hidden_size)
            self.project = nn.Linear(total, config.width)
            self.blocks = nn.ModuleList(
                RouterBlock(config.width, config.expansion, config.dropout) for _ in range(config.num_blocks)
            )
            self.norm = nn.LayerNorm(config.width)
            self.head = nn.Linear(config.width, 1)
        self._embedding: torch.Tensor | None = None  # plain tensors: neither moved nor saved with the router
        self._row_of: torch.Tensor | None = None  # row of each id, where not all rows were read
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialisation, as in the paper's code; a logistic regression starts from zero."""
        if isinstance(module, nn.Linear):
            if self.config.architecture == "linear":
                init.zeros_(module.weight)
                init.zeros_(module.bias)
            else:
                bound = module.in_features**-0.5
                init.uniform_(module.weight, -bound, bound)
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> TokenRouter:
        """As of any `PreTrainedModel`, but from safetensors alone: a router may be anybody's, and pickles run code."""
        return super().from_pretrained(pretrained_model_name_or_path, *args, **{**kwargs, "use_safetensors": True})

    @property
    def threshold(self) -> float:
        """The calibrated threshold.

        Raises:
            ValueError: the router was not calibrated.
        """
        if self.config.threshold is None:
            raise ValueError("The router has no threshold: calibrate it (`tokalign calibrate`) or pass one.")
        return float(self.config.threshold)

    def forward(
        self,
        hidden: torch.Tensor | None = None,
        token_embedding: torch.Tensor | None = None,
        top_logits: torch.Tensor | None = None,
        entropy: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pos_weight: float | torch.Tensor | None = None,
    ) -> RouterOutput:
        """Logits of N tokens, and the loss.

        Args:
            hidden: (N, d). This and the next three: those of `config.inputs`, others are not read.
            token_embedding: (N, e), the SLM's embedding of the token that it predicts.
            top_logits: (N, k), falling.
            entropy: (N,), nats.
            labels: (N,), 1 = divergent.
            pos_weight: weight of divergent tokens in the loss, n0/n1 in the paper; None is 1.
        """
        given = {"hidden": hidden, "token": token_embedding, "logits": top_logits, "entropy": entropy}
        parts = []
        for name in self.config.inputs:
            value = given[name]
            if value is None:
                raise ValueError(f"This router reads {', '.join(self.config.inputs)}, and {name} was not passed.")
            value = value.to(self.head.weight.dtype)
            if name == "entropy":
                value = value[:, None]
            elif name == "logits" and self.config.architecture == "mlp":
                value = self.project_logits(value)
            parts.append(value)
        x = torch.cat(parts, dim=-1)
        if self.config.architecture == "mlp":
            x = self.project(x)
            for block in self.blocks:
                x = block(x)
            x = self.norm(x)
        logits = self.head(x).squeeze(-1)
        loss = None
        if labels is not None:
            weight = None if pos_weight is None else torch.as_tensor(pos_weight, device=logits.device).float()
            loss = binary_cross_entropy_with_logits(logits.float(), labels.float(), pos_weight=weight)
        return RouterOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def scores(
        self, hidden: torch.Tensor | None, logits: torch.Tensor, *, predicted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scores (N,) float32 in [0, 1] of N next tokens, from the SLM's `hidden` (N, d) and `logits` (N, V).

        Call it on a router in `eval()` mode, with the embedding attached if it reads the predicted token.

        Args:
            predicted: (N,) ids to score instead of the likeliest, for a router that reads the token.
        """
        features = row_features(
            hidden,
            logits,
            top_k=self.config.top_k,
            shared_vocab=self.config.shared_vocab,
            needs=self.config.inputs,
        )
        if "predicted" in features:
            likeliest = features.pop("predicted")
            features["token_embedding"] = self.token_embedding(likeliest if predicted is None else predicted)
        return cast(torch.Tensor, self(**features).logits).float().sigmoid()

    # ------------------------------------------------------------------------------------------- the SLM's embedding

    def attach_embedding(self, weight: torch.Tensor) -> None:
        """Use `weight` (V, e), the SLM's input embedding, by reference: not copied, trained, moved or saved."""
        self._check_embedding(tuple(weight.shape), "The embedding")
        self._embedding, self._row_of = weight.detach(), None

    def attach_embedding_of(self, slm: str | Path, ids: np.ndarray | None = None) -> None:
        """Read the input embedding of a model, and nothing else of it.

        Args:
            slm: hub id or folder.
            ids: sorted ids whose rows are needed; None is all. Other ids then have no embedding.
        """
        file, key = _embedding_tensor(str(slm))
        with safe_open(file, framework="pt") as stored:
            tensor = stored.get_slice(key)
            shape = tuple(tensor.get_shape())
            self._check_embedding(shape, f"The embedding of {slm}")
            if ids is None:
                self._embedding, self._row_of = tensor[:], None
                return
            wanted = torch.as_tensor(np.asarray(ids, dtype=np.int64))
            blocks = []
            for start in range(0, shape[0], _ROWS):
                inside = wanted[(wanted >= start) & (wanted < start + _ROWS)]
                if len(inside):
                    blocks.append(tensor[start : min(start + _ROWS, shape[0])][inside - start])
            self._embedding = torch.cat(blocks)
            self._row_of = torch.full((shape[0],), -1)
            self._row_of[wanted] = torch.arange(len(wanted))

    @property
    def has_embedding(self) -> bool:
        return self._embedding is not None

    def token_embedding(self, ids: torch.Tensor) -> torch.Tensor:
        """The SLM's embedding (N, e) of `ids` (N,), on the device of `ids`."""
        if self._embedding is None:
            raise ValueError(
                "The router has no embedding of its SLM: call attach_embedding or attach_embedding_of first."
            )
        rows = ids.to(self._embedding.device)
        if self._row_of is not None:
            rows = self._row_of[rows]
            if (rows < 0).any():
                missing = int(ids.flatten()[int((rows < 0).flatten().int().argmax())])
                raise ValueError(f"The row of id {missing} was not read; attach the embedding with all ids in play.")
        return self._embedding[rows].to(ids.device)

    def _check_embedding(self, shape: tuple[int, ...], what: str) -> None:
        if len(shape) != 2 or shape[1] != self.config.embedding_size or shape[0] < self.config.shared_vocab:
            raise ValueError(
                f"{what} has shape {list(shape)}, but the router was made for at least {self.config.shared_vocab} rows "
                f"of {self.config.embedding_size}; use the SLM that it was trained for{self._slm_name()}."
            )

    # ---------------------------------------------------------------------------------------------- which SLM it is for

    def _slm_name(self) -> str:
        name = (self.config.slm or {}).get("name")
        return f", {name}" if name else ""

    def check_slm(self, slm: str | Path) -> None:
        """Refuse an SLM (or an adapter on one), by hub id or folder, that is not the one whose features the router was
        trained on.

        Raises:
            ValueError: other hidden size, or other weights (`tokalign.stage.hashes.weights_hash`).
        """
        hidden = AutoConfig.from_pretrained(base_of(str(slm))).get_text_config().hidden_size
        if hidden != self.config.hidden_size:
            raise ValueError(
                f"{slm} has hidden size {hidden}, but the router was trained for {self.config.hidden_size}; use the "
                f"SLM that it was trained for{self._slm_name()}."
            )
        trained, given = (self.config.slm or {}).get("weights_hash"), weights_hash(slm)
        if trained is not None and trained != given:
            raise ValueError(
                f"The router was trained on another SLM than {slm} (weights {trained[:12]}, not {given[:12]}); use the "
                f"one that it was trained for{self._slm_name()}, by the same path or id, or train one for this SLM."
            )


def embedding_shape(slm: str | Path) -> tuple[int, int]:
    """Rows and width of a model's input embedding, by hub id or folder; none of it is read."""
    file, key = _embedding_tensor(str(slm))
    with safe_open(file, framework="pt") as stored:
        rows, width = stored.get_slice(key).get_shape()
    return rows, width


def _embedding_tensor(slm: str) -> tuple[str, str]:
    """File and name of the input embedding among a model's safetensors files; a hub model's other files stay away."""
    slm = base_of(slm)  # an adapter has no embedding of its own
    config = AutoConfig.from_pretrained(slm)
    text = config.get_text_config()
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if type(text) not in classes:
        raise ValueError(f"{slm} is of the type {text.model_type!r}, which is no causal LM of transformers; use one.")
    with torch.device("meta"):  # not by from_config: under ZeRO-3 transformers would fill it, which has no memory
        model = classes[type(text)](text)
    weight = model.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is weight)
    index = file_or_none(slm, "model.safetensors.index.json")
    if index is None:
        file = file_or_none(slm, "model.safetensors")
        if file is None:
            raise ValueError(f"{slm} has no model.safetensors; save it with save_pretrained.")
        with safe_open(file, framework="pt") as stored:
            return file, _key(list(stored.keys()), name, slm)
    shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    key = _key(list(shards), name, slm)
    if Path(shards[key]).name != shards[key]:  # the index may be anybody's
        raise ValueError(f"The index of {slm} names the file {shards[key]!r}, which is not in its folder.")
    return cast(str, cached_file(slm, shards[key])), key


def _key(keys: list[str], name: str, slm: str) -> str:
    """The stored name of parameter `name`: checkpoints of the same model may have another prefix."""
    suffix = "." + ".".join(name.split(".")[-2:])
    alike = [key for key in keys if key == name] or [key for key in keys if key.endswith(suffix)]
    if len(alike) != 1:
        raise ValueError(
            f"{slm} has {len(alike)} tensors that may be its input embedding {name!r}; save it with save_pretrained."
        )
    return alike[0]
