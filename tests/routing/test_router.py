"""`TokenRouter`: its equation by a plain loop, its inputs, saving, the SLM's embedding, and every refusal."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig as SlmConfig

from tests.support import save_tiny, tiny_model
from tokalign.routing.labels.features import row_features
from tokalign.routing.router.card import write_model_card
from tokalign.routing.router.model import TokenRouter, TokenRouterConfig, embedding_shape
from tokalign.stage.hashes import weights_hash

SMALL = {"hidden_size": 8, "embedding_size": 6, "shared_vocab": 20, "top_k": 5, "width": 16, "num_blocks": 2}


def router(seed: int = 0, **changes) -> TokenRouter:
    torch.manual_seed(seed)
    return TokenRouter(TokenRouterConfig(**{**SMALL, **changes})).eval()


def rows(n: int = 7, vocab: int = 23, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, logits (three ids are not shared) and an embedding."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=draw) for shape in ((n, 8), (n, vocab), (vocab, 6)))  # type: ignore


def plain_score(model: TokenRouter, hidden, logits, embedding) -> float:
    """One token's score, number by number from the module's equation."""
    weights = {name: tensor.tolist() for name, tensor in model.state_dict().items()}

    def linear(name, x):
        return [
            sum(w * v for w, v in zip(row, x, strict=True)) + b
            for row, b in zip(weights[f"{name}.weight"], weights[f"{name}.bias"], strict=True)
        ]

    def norm(name, x):
        mean = sum(x) / len(x)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
        pairs = zip(weights[f"{name}.weight"], weights[f"{name}.bias"], strict=True)
        return [(v - mean) / deviation * w + b for v, (w, b) in zip(x, pairs, strict=True)]

    shared = logits.tolist()[: model.config.shared_vocab]
    total = sum(math.exp(z) for z in shared)
    parts = {
        "hidden": hidden.tolist(),
        "token": embedding[shared.index(max(shared))].tolist(),
        "logits": sorted(shared, reverse=True)[: model.config.top_k],
        "entropy": [-sum(math.exp(z) / total * math.log(math.exp(z) / total) for z in shared)],
    }
    if model.config.architecture == "mlp" and "logits" in model.config.inputs:
        parts["logits"] = linear("project_logits", parts["logits"])
    x = [value for name in model.config.inputs for value in parts[name]]
    if model.config.architecture == "mlp":
        x = linear("project", x)
        for block in range(model.config.num_blocks):
            inner = linear(f"blocks.{block}.up", norm(f"blocks.{block}.norm", x))
            inner = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in inner]
            x = [a + b for a, b in zip(x, linear(f"blocks.{block}.down", inner), strict=True)]
        x = norm("norm", x)
    return 1 / (1 + math.exp(-linear("head", x)[0]))


@pytest.mark.parametrize("architecture", ["mlp", "linear"])
@pytest.mark.parametrize(
    "inputs", [["hidden", "token", "logits"], ["entropy"], ["token", "hidden", "logits", "entropy"], ["logits"]]
)
def test_scores_equal_a_plain_loop(architecture, inputs):
    model = router(architecture=architecture, inputs=inputs)
    torch.manual_seed(3)
    for parameter in model.parameters():  # a linear router starts at zero
        parameter.data.normal_(std=0.4)
    hidden, logits, embedding = rows()
    model.attach_embedding(embedding)
    expected = [plain_score(model, h, z, embedding) for h, z in zip(hidden, logits, strict=True)]
    scores = model.scores(hidden if "hidden" in inputs else None, logits)
    assert scores.dtype == torch.float32 and scores.shape == (7,)
    torch.testing.assert_close(scores.double(), torch.tensor(expected).double(), rtol=0, atol=2e-6)


def test_the_paper_s_router_has_its_size():
    with torch.device("meta"):
        model = TokenRouter(TokenRouterConfig())
    d, w = 1536, 1024
    block = 2 * w + (w * 4 * w + 4 * w) + (4 * w * w + w)
    count = (100 * d + d) + (3 * d * w + w) + 6 * block + 2 * w + (w + 1)
    assert sum(p.numel() for p in model.parameters()) == count == 55_252_481  # "≈ 56 M"


def test_the_loss_is_the_weighted_cross_entropy():
    model = router(inputs=["hidden"])
    hidden, _, _ = rows()
    labels = torch.tensor([0.0, 1, 0, 0, 1, 0, 0])
    output = model(hidden=hidden, labels=labels, pos_weight=2.5)
    expected = [
        2.5 * math.log1p(math.exp(-f)) if y else math.log1p(math.exp(f))
        for f, y in zip(output.logits.tolist(), labels.tolist(), strict=True)
    ]
    assert output.loss.item() == pytest.approx(sum(expected) / 7, rel=1e-6)
    plain = model(hidden=hidden, labels=labels).loss.item()
    assert plain == pytest.approx(sum(e / (2.5 if y else 1) for e, y in zip(expected, labels, strict=True)) / 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_take_any_type_and_no_rows(dtype):
    model = router()
    hidden, logits, embedding = (x.to(dtype) for x in rows())
    model.attach_embedding(embedding)
    low = model.scores(hidden, logits)
    model.attach_embedding(embedding.float())
    torch.testing.assert_close(low, model.scores(hidden.float(), logits.float()), rtol=0, atol=1e-3)
    assert model.scores(hidden[:0], logits[:0]).shape == (0,)
    assert torch.isfinite(model.to(dtype).scores(hidden, logits)).all()


def test_row_features_makes_what_is_needed_and_reads_shared_ids_only():
    hidden, logits, _ = rows()
    logits[:, 20:] = 1e4  # not shared
    banned = logits.clone()
    banned[:, 3] = -torch.inf
    assert row_features(None, logits, top_k=5, shared_vocab=20, needs=["token"]).keys() == {"predicted"}
    assert row_features(None, logits, top_k=5, shared_vocab=20, needs=["logits"]).keys() == {"top_logits"}
    features = row_features(hidden, banned, top_k=5, shared_vocab=20, needs=["hidden", "logits", "token", "entropy"])
    assert features["predicted"].max() < 20 and features["top_logits"].max() < 1e4
    for row, entropy in zip(banned[:, :20].tolist(), features["entropy"].tolist(), strict=True):
        total = sum(math.exp(z) for z in row)
        probabilities = [math.exp(z) / total for z in row]
        assert entropy == pytest.approx(-sum(p * math.log(p) for p in probabilities if p), rel=1e-5)


def test_saved_and_loaded_by_safetensors_alone(tmp_path):
    model = router(threshold=0.25, calibration={"target": {"target_rate": 0.1}}, slm={"name": "a/b"})
    hidden, logits, embedding = rows()
    model.attach_embedding(torch.nn.Parameter(embedding))  # as an SLM has it
    assert not any("embedding" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    again = TokenRouter.from_pretrained(tmp_path).eval()
    again.attach_embedding(embedding)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    # not equal to the last bit: mapped weights lie elsewhere in memory, and the kernels go by that
    torch.testing.assert_close(again.scores(hidden, logits), model.scores(hidden, logits), rtol=0, atol=1e-6)
    assert again.threshold == 0.25 and again.config.slm == {"name": "a/b"}
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        TokenRouter.from_pretrained(tmp_path)


def test_the_attached_embedding_is_the_slm_s_own():
    model = router()
    _, _, embedding = rows()
    model.attach_embedding(embedding)
    embedding[4] = 7.0
    assert torch.equal(model.token_embedding(torch.tensor([4, 0])), embedding[[4, 0]])


@pytest.mark.parametrize("sharded", [False, True])
def test_the_embedding_is_read_from_the_slm_s_files(tmp_path, sharded):
    slm = tiny_model(70, hidden_size=16)
    slm.save_pretrained(tmp_path, max_shard_size="4KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    model = router(hidden_size=16, embedding_size=16, shared_vocab=70)
    weight = AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings().weight.detach()
    model.attach_embedding_of(tmp_path)
    assert torch.equal(model.token_embedding(torch.arange(70)), weight)
    model.attach_embedding_of(tmp_path, np.array([2, 5, 69]))
    assert torch.equal(model.token_embedding(torch.tensor([[69, 2], [5, 5]])), weight[torch.tensor([[69, 2], [5, 5]])])
    with pytest.raises(ValueError, match="The row of id 3 was not read"):
        model.token_embedding(torch.tensor([2, 3]))


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": []}, r"`inputs` must be some of hidden, token, logits, entropy, each once, got \[\]"),
        ({"inputs": ["text"]}, r"each once, got \['text'\]"),
        ({"inputs": ["token", "token"]}, "each once"),
        ({"architecture": "tree"}, "`architecture` must be 'mlp' or 'linear', got 'tree'"),
        ({"top_k": 21}, "`top_k` is 21: use 1 to 20, the shared ids"),
    ],
)
def test_bad_shapes_are_refused(changes, message):
    with pytest.raises(Exception, match=message):  # huggingface_hub's own kind of error
        TokenRouterConfig(**{**SMALL, **changes})


def test_a_missing_threshold_is_refused():
    with pytest.raises(ValueError, match=r"no threshold: calibrate it \(`tokalign calibrate`\) or pass one\.$"):
        _ = router().threshold
    assert router(threshold=0).threshold == 0.0


def test_missing_inputs_are_refused():
    model = router()
    hidden, logits, embedding = rows()
    with pytest.raises(ValueError, match="no embedding of its SLM: call attach_embedding"):
        model.scores(hidden, logits)
    model.attach_embedding(embedding)
    with pytest.raises(ValueError, match="reads the SLM's hidden states; pass them"):
        model.scores(None, logits)
    with pytest.raises(ValueError, match="reads hidden, token, logits, and token was not passed"):
        model(hidden=hidden)
    with pytest.raises(ValueError, match=r"The embedding has shape \[23, 5\], .* at least 20 rows of 6"):
        model.attach_embedding(embedding[:, :5])
    with pytest.raises(ValueError, match=r"The embedding has shape \[19, 6\]"):
        model.attach_embedding(embedding[:19])


def test_another_slm_is_refused(tmp_path):
    own, other = (save_tiny(tmp_path / name, seed=seed) for name, seed in (("own", 0), ("other", 1)))
    vocab = SlmConfig.from_pretrained(own).vocab_size
    slm = {"name": own, "weights_hash": weights_hash(own)}
    model = router(hidden_size=32, embedding_size=32, shared_vocab=vocab, slm=slm)
    model.check_slm(own)
    with pytest.raises(ValueError, match=rf"trained on another SLM than {other} .* for, {own}, by the same path"):
        model.check_slm(other)
    wide = save_tiny(tmp_path / "wide", hidden_size=16)
    with pytest.raises(ValueError, match="has hidden size 16, but the router was trained for 32"):
        model.check_slm(wide)
    with pytest.raises(ValueError, match=rf"The embedding of {wide} has shape \[\d+, 16\]"):
        model.attach_embedding_of(wide)


def test_models_without_their_embedding_are_refused(tmp_path):
    slm = tiny_model(70, hidden_size=16)
    slm.save_pretrained(tmp_path)
    model = router(hidden_size=16, embedding_size=16, shared_vocab=70)
    (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"has no model\.safetensors; save it with save_pretrained"):
        model.attach_embedding_of(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match=r"names the file '\.\./elsewhere\.safetensors', which is not in its folder"):
        model.attach_embedding_of(tmp_path)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "elsewhere.safetensors"}}))
    with pytest.raises(
        ValueError, match=r"has 0 tensors that may be its input embedding 'model\.embed_tokens\.weight'"
    ):
        model.attach_embedding_of(tmp_path)


def test_the_model_card_says_what_the_router_is_for(tmp_path):
    achieved = {"rate": 0.1, "recall": 0.9, "accuracy": 0.7, "n_responses": 12, "n_tokens": 300}
    calibration = {"target": {"target_rate": 0.12}, "achieved": achieved, "split": "calibration"}
    model = router(threshold=0.5, calibration=calibration, slm={"name": "Qwen/Qwen3-0.6B", "weights_hash": "abc"})
    text = write_model_card(model, tmp_path, dataset_name="runs/labels").read_text()
    for words in ("base_model: Qwen/Qwen3-0.6B", "threshold: 0.5", "target_rate 0.12", "runs/labels", "`abc`"):
        assert words in text
    assert "base_model" not in write_model_card(router(slm={"name": str(tmp_path)}), tmp_path).read_text()


def test_a_model_that_is_no_causal_lm_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    with pytest.raises(ValueError, match=r"is of the type 'clip_vision_model', which is no causal LM"):
        embedding_shape(tmp_path)
