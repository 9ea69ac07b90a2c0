"""The threshold for a served rate: what decoding with it really gives, and what is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.support import tiny_model, tiny_tokenizer
from tokalign.generation.protocol import SamplingParams
from tokalign.routing.decode.generator import RoutedGenerator
from tokalign.routing.decode.policies import AlwaysLLM, EntropyPolicy
from tokalign.routing.decode.served_rate import between, served_threshold

TOKENIZER = tiny_tokenizer()
SLM = tiny_model(len(TOKENIZER), seed=0)
LLM = tiny_model(len(TOKENIZER), seed=1, hidden_size=48, layers=3)
DRAW = random.Random(0)
PROMPTS = [[DRAW.randrange(6, 60) for _ in range(8)] for _ in range(24)]
PARAMS = SamplingParams(temperature=0, max_tokens=24)


@pytest.mark.parametrize("target", [0.1, 0.3])
def test_decoding_with_the_threshold_serves_the_rate(target):
    policy = EntropyPolicy(0.0)  # routes everything: far from both targets
    generator = RoutedGenerator(SLM, LLM, TOKENIZER, policy)
    found = served_threshold(generator, PROMPTS, PARAMS, target, tolerance=0.01)
    assert policy.threshold == 0.0  # the caller's own is put back
    policy.threshold = found.threshold
    done = [completion for each in generator.generate(PROMPTS, PARAMS) for completion in each]
    tokens = sum(len(completion.token_ids) for completion in done)
    rate = sum(sum(completion.written_by) for completion in done) / tokens
    assert rate == found.llm_rate and tokens == found.tokens and found.prompts == 24
    assert rate == pytest.approx(target, abs=0.04)


def test_a_threshold_lies_between_the_scores_and_routes_the_share():
    scores = np.random.default_rng(0).permutation(np.arange(10.0))
    for share, routed in ((0.3, 3), (0.04, 1), (0.97, 10), (1.0, 10)):  # at least one, as the quantile has it
        threshold = between(scores, share)
        assert (scores >= threshold).sum() == routed
        assert (threshold in scores) == (routed == 10)


def test_refusals():
    generator = RoutedGenerator(SLM, LLM, TOKENIZER, AlwaysLLM())
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        served_threshold(generator, PROMPTS, PARAMS, 1.0)
    with pytest.raises(ValueError, match="AlwaysLLM has no threshold"):
        served_threshold(generator, PROMPTS[:2], PARAMS, 0.1)
