"""Rewards in batches against the raw model reading one row at a time, for every way that a model may give them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification, LlamaModel

from tests.support import save_tiny, tiny_tokenizer
from tokalign.rewards.reward_model import RewardModel

CONVERSATIONS = [
    ("What is 1+1?", "2"),
    ("Say hello to all of us, please.", "Hello, all of you! How do you do?"),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}], "No reason."),
    ("a", ""),
    ("What is 1+1?", "It is 3, as we all know."),
    ("b" * 30, "c" * 40),
    ("What is 1+1?", "2"),
]
# A model with code of its own, as ArmoRM has: it imports a name that transformers 5 lacks, weighs several objectives by
# what it reads at the end of the prompt, finds the end of a row by the first padding token, and returns `score`.
GATED = """
from dataclasses import dataclass
import torch
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import LLAMA_INPUTS_DOCSTRING
from transformers.utils import ModelOutput, add_start_docstrings_to_model_forward

@dataclass
class GatedOutput(ModelOutput):
    rewards: torch.Tensor = None
    score: torch.Tensor = None
    logits: torch.Tensor = None

class GatedRewardModel(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.objectives = torch.nn.Linear(config.hidden_size, 3, bias=False)
        self.gate = torch.nn.Linear(config.hidden_size, 3, bias=False)
        self.post_init()

    @add_start_docstrings_to_model_forward(LLAMA_INPUTS_DOCSTRING)
    def forward(self, input_ids=None, attention_mask=None, return_dict=None):
        hidden = self.model(input_ids, attention_mask=attention_mask)[0]
        last = torch.eq(input_ids, self.config.pad_token_id).int().argmax(-1) - 1
        rewards = self.objectives(hidden[torch.arange(len(hidden)), last])
        answer = torch.eq(input_ids, 3).int().argmax(-1)  # <|assistant|>
        weights = self.gate(hidden[torch.arange(len(hidden)), answer]).softmax(-1)
        score = (weights * rewards).sum(-1)
        return GatedOutput(rewards=rewards, score=score, logits=score)
"""


def config(labels: int, pad_token_id: int | None = 0) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        num_labels=labels,
        pad_token_id=pad_token_id,
        bos_token_id=None,
        eos_token_id=1,
    )


def save_reward_model(path: Path, labels: int = 1, pad_token_id: int | None = 0) -> str:
    torch.manual_seed(labels)
    tokenizer = tiny_tokenizer()
    if pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # as many checkpoints have it; every row ends with this token
    tokenizer.save_pretrained(path)
    LlamaForSequenceClassification(config(labels, pad_token_id)).float().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> str:
    return save_reward_model(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> str:
    return save_reward_model(tmp_path_factory.mktemp("three"), labels=3)


def rows_of(model: RewardModel) -> list[list[int]]:
    return [model.encode(prompt, completion) for prompt, completion in CONVERSATIONS]


@torch.no_grad()
def alone(path: str, rows: list[list[int]], index: int = 0) -> list[float]:
    """The model's own output on each row by itself, no padding and no mask."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    return [model(input_ids=torch.tensor([row])).logits[0, index].item() for row in rows]


@pytest.mark.parametrize("token_budget", [1, 100, 10_000])
def test_batches_equal_one_row_at_a_time(one: str, token_budget: int) -> None:
    model = RewardModel(one, token_budget=token_budget)
    rows = rows_of(model)
    rewards = model.score(rows)
    torch.testing.assert_close(torch.tensor(rewards), torch.tensor(alone(one, rows)), rtol=1e-4, atol=1e-5)
    assert len(set(rewards)) >= 6 and rewards[0] == pytest.approx(rewards[-1])


def test_batches_respect_the_budget(one: str) -> None:
    model = RewardModel(one, token_budget=20)
    lengths = [3, 9, 5, 30, 4, 8, 5]
    batches = list(model._batches(lengths))
    assert batches == [[3], [1, 5], [2, 6, 4, 0]]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))


def test_conversations_are_rendered_by_the_models_own_template(one: str) -> None:
    model = RewardModel(one)
    read = [model.tokenizer.decode(row) for row in rows_of(model)]
    assert read[0] == "<|user|>What is 1+1?<|end|><|assistant|>2<|end|>"
    assert read[2] == "<|system|>Be brief.<|end|><|user|>Why?<|end|><|assistant|>No reason.<|end|>"
    other = RewardModel(one, chat_template="{% for m in messages %}{{ m['content'] }};{% endfor %}")
    assert other.tokenizer.decode(other.encode("a", "b")) == "a;b;"


def test_an_output_of_several(three: str) -> None:
    rewards = []
    for index in range(3):
        model = RewardModel(three, reward_index=index)
        rows = rows_of(model)
        rewards.append(model.score(rows))
        expected = torch.tensor(alone(three, rows, index))
        torch.testing.assert_close(torch.tensor(rewards[-1]), expected, rtol=1e-4, atol=1e-5)
    assert rewards[0] != rewards[1] != rewards[2]


def test_a_model_without_a_padding_token_is_batched_as_it_reads_rows_alone(tmp_path: Path) -> None:
    path = save_reward_model(tmp_path, pad_token_id=None)
    rows = rows_of(RewardModel(path))
    expected = alone(path, rows)  # this model's rule: the last position, here the end token
    torch.testing.assert_close(
        torch.tensor(RewardModel(path).score(rows)), torch.tensor(expected), rtol=1e-4, atol=1e-5
    )


def test_a_model_with_code_of_its_own_gives_its_score(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, objectives, gate = LlamaModel(config(1)).eval(), torch.randn(3, 32), torch.randn(3, 32)
    weights = {f"model.{name}": value for name, value in base.state_dict().items()}
    weights |= {"objectives.weight": objectives, "gate.weight": gate}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = config(1)
    settings.auto_map = {"AutoModelForSequenceClassification": "modeling_gated.GatedRewardModel"}
    settings.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "modeling_gated.py").write_text(GATED)

    model = RewardModel(str(tmp_path), trust_remote_code=True)
    expected = []
    for row in rows_of(model):
        with torch.no_grad():
            hidden = base(torch.tensor([row]))[0][0]
        expected.append(((gate @ hidden[row.index(3)]).softmax(-1) @ (objectives @ hidden[-1])).item())
    torch.testing.assert_close(torch.tensor(model.score(rows_of(model))), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_rows_too_long_are_refused_by_name(one: str) -> None:
    model = RewardModel(one)
    long = model.encode("x" * 100, "y" * 100)
    assert model.problem(long) == "prompt and completion are longer than the reward model's 128 positions"
    assert model.problem(long[:128]) is None
    with pytest.raises(ValueError, match=r"Row p7: prompt and completion are longer .* drop the row or shorten it\."):
        model.score([[5, 6], long], names=["p6", "p7"])


def test_outputs_and_index_must_fit(one: str, three: str) -> None:
    with pytest.raises(ValueError, match=r"has 3 outputs \(0 LABEL_0, 1 LABEL_1, 2 LABEL_2\): say .* --reward_index"):
        RewardModel(three)
    with pytest.raises(ValueError, match=r"--reward_index is 3, but .* has 3 outputs: use 0 to 2\."):
        RewardModel(three, reward_index=3)
    with pytest.raises(ValueError, match=r"--reward_index is -1, but .* has 1 outputs: use 0 to 0\."):
        RewardModel(one, reward_index=-1)


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no trained weight 'score\.weight', so its outputs are noise: use"):
        RewardModel(save_tiny(tmp_path))


def test_templates_that_are_absent_or_refuse(one: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"Row p1: the chat template .* refuses the conversation \(no system messages\)"
    ):
        template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}!"
        RewardModel(one, chat_template=template).encode(CONVERSATIONS[2][0], "x", name="p1")
    save_reward_model(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"has no chat template.*--reward_chat_template"):
        RewardModel(str(tmp_path))


def test_rewards_that_are_not_finite_are_named(one: str) -> None:
    model = RewardModel(one)
    model.model.score.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Row p1: the reward of .* is nan; score in fp32 \(--dtype float32\)"):
        model.score([rows_of(model)[1]], names=["p1"])
