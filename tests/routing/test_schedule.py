"""When rows join, wait, give way and end: none of it changes a row's tokens. Cases of `shared/faults/routing`."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.routing.test_generator import LLM, SLM, TOKENIZER, VOCAB, Toy, count_forwards, make_prompts
from tests.support import tiny_model
from tokalign.generation.protocol import SamplingParams
from tokalign.routing.decode import schedule, slots
from tokalign.routing.decode.backend import RoutedToken, RowFailed
from tokalign.routing.decode.generator import RoutedGenerator
from tokalign.routing.decode.pace import Pace
from tokalign.routing.decode.policies import AlwaysLLM, HysteresisPolicy, NeverLLM, RandomPolicy, ReplayPolicy
from tokalign.routing.decode.schedule import LONGEST_WAIT, MOST_OVERTAKEN, RoutedBatch


def endless(policy, **options) -> RoutedGenerator:
    """A pair of which no model ends a completion."""
    generator = RoutedGenerator(SLM, LLM, TOKENIZER, policy, **options)
    generator.end_ids = [frozenset(), frozenset()]
    return generator


def written(generator: RoutedGenerator, prompts, params) -> list[list[tuple]]:
    results = generator.generate(prompts, params)
    return [[(c.token_ids, c.written_by, c.finish_reason) for c in each] for each in results]


def held(batch: RoutedBatch) -> int:
    return max(model.held for model in batch._models)


PROMPTS = make_prompts(12, seed=4)
PARAMS = [SamplingParams(n=1 + i % 2, seed=i, temperature=0.8 * (i % 3 > 0), max_tokens=5 + 4 * i) for i in range(12)]


@pytest.mark.parametrize("llm_wait", [2, 99, "quarter", "auto"])
@pytest.mark.parametrize(
    ("policy", "span"),
    [(Toy(), 1), (Toy(), 3), (RandomPolicy(0.2), 1), (HysteresisPolicy(0.7, 0.6), 1), (AlwaysLLM(), 1)],
)
def test_waiting_for_the_llm_changes_no_token(policy, span, llm_wait):
    lock_step = RoutedGenerator(SLM, LLM, TOKENIZER, policy, llm_span=span, max_rows=7, llm_wait=0)
    waiting = RoutedGenerator(SLM, LLM, TOKENIZER, policy, llm_span=span, max_rows=7, llm_wait=llm_wait)
    assert written(waiting, PROMPTS, PARAMS) == written(lock_step, PROMPTS, PARAMS)


def test_the_llm_runs_for_so_many_rows_and_no_row_waits_for_ever():
    batch = RoutedBatch(endless(RandomPolicy(0.1), llm_wait=6))
    for i, prompt in enumerate(make_prompts(12)):
        batch.add(prompt, SamplingParams(seed=i, max_tokens=60))
    by_llm = []
    while len(batch.rows) == 12 or not batch.rows:
        by_llm.append(sum(token.by_llm for _, token, _ in batch.step()))
    assert any(by_llm) and all(n == 0 or n >= 6 for n in by_llm)
    # Two rows, of which one is never routed: nobody joins the other's wait.
    batch = RoutedBatch(endless(ReplayPolicy([[3], []]), llm_wait=2))
    keys = [batch.add([7, 8, 9], SamplingParams(seed=i, max_tokens=60)) for i in range(2)]
    steps = [{key for key, *_ in batch.step()} for _ in range(50)]
    gap = [i for i, given in enumerate(steps) if keys[0] not in given]
    assert gap == list(range(3, 3 + LONGEST_WAIT))  # it stands still so long and no longer
    assert all(keys[1] in given for given in steps)


def test_rows_are_admitted_by_what_they_hold_and_the_youngest_comes_back_exactly(monkeypatch):
    monkeypatch.setattr(schedule, "ROOM", 16)
    monkeypatch.setattr(slots, "SMALLEST", 8)
    prompts = make_prompts(10, longest=20)
    params = [SamplingParams(n=1, seed=i, max_tokens=60, temperature=0.7) for i in range(10)]
    expected = [c.token_ids for (c,) in endless(Toy(), llm_wait=0).generate(prompts, params)]
    for llm_wait, chunk in ((0, 512), (3, 16)):
        batch = RoutedBatch(endless(Toy(), token_budget=300, llm_wait=llm_wait, prefill_chunk=chunk))
        keys = [batch.add(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        tokens: dict[int, list[int]] = {key: [] for key in keys}
        most = preempted = 0
        before: set[int] = set()
        while batch:
            given = batch.step()
            ended = {key for key, token, _ in given if token.finish_reason is not None}
            now = {row.key for row in batch.rows}
            gone = before - now - ended
            assert not gone or min(gone) > max(now, default=0)  # the youngest
            preempted += len(gone)
            before = now
            for key, token, _ in given:
                tokens[key].append(token.id)
            most = max(most, len(batch.rows))
            assert held(batch) <= 300
        assert list(tokens.values()) == expected
        assert most > 300 // 60 and preempted  # more than would fit at their full width; and they did not all fit
        assert min(tokens) == keys[0] and not batch._models[0].lengths


def test_chats_without_a_limit_all_start_at_once():
    batch = RoutedBatch(endless(Toy(), token_budget=2500))
    params = SamplingParams(max_tokens=400, seed=1)  # each may fill most of the model's 512 positions
    keys = {batch.add(prompt, params) for prompt in make_prompts(8)}
    short = batch.add([7, 8], replace(params, max_tokens=5))
    assert {key for key, *_ in batch.step()} <= keys | {short} and len(batch.rows) == 9
    first = {key for _ in range(40) for key, *_ in batch.step()}
    assert keys <= first and all(row.key != short for row in batch.rows)  # it has ended long before them


def test_a_large_prompt_is_overtaken_by_small_ones_but_only_so_often(monkeypatch):
    monkeypatch.setattr(slots, "SMALLEST", 8)
    batch = RoutedBatch(endless(NeverLLM(), token_budget=400))
    rows = [batch.add([7] * 150, SamplingParams(max_tokens=200, seed=0))]
    large = batch.add([8] * 300, SamplingParams(max_tokens=10, seed=0))
    small = [batch.add([9] * 5, SamplingParams(max_tokens=4, seed=i)) for i in range(60)]
    joined: list[int] = []
    while batch:
        batch.step()
        joined += [row.key for row in batch.rows if row.key not in joined]
    assert joined == [*rows, *small[:MOST_OVERTAKEN], large, *small[MOST_OVERTAKEN:]]


def test_one_row_that_outgrows_the_budget_goes_on_alone():
    ((c,),) = endless(NeverLLM(), token_budget=10).generate([[7] * 30], SamplingParams(max_tokens=20, seed=0))
    assert len(c.token_ids) == 20


@pytest.mark.parametrize("chunk", [3, 40])
def test_prompts_in_pieces_give_the_same_tokens(chunk):
    prompts = make_prompts(5, seed=6, longest=60)
    params = [SamplingParams(n=1 + i % 3, seed=i, max_tokens=8) for i in range(5)]
    for policy in (Toy(), RandomPolicy(0.3), AlwaysLLM()):
        whole = RoutedGenerator(SLM, LLM, TOKENIZER, policy, max_rows=6, prefill_chunk=10**6)
        pieces = RoutedGenerator(SLM, LLM, TOKENIZER, policy, max_rows=6, prefill_chunk=chunk)
        assert written(pieces, prompts, params) == written(whole, prompts, params)


def test_a_long_prompt_is_read_in_pieces_beside_the_rows_that_write():
    batch = RoutedBatch(endless(RandomPolicy(0.5), prefill_chunk=16))
    writers = [batch.add(prompt, SamplingParams(max_tokens=200, seed=i)) for i, prompt in enumerate(make_prompts(3))]
    while any(not row.age for row in batch.rows) or not batch.rows:
        batch.step()
    long = [batch.add([9, *range(6, 60)] * 4, SamplingParams(max_tokens=8, seed=i)) for i in range(2)]  # one prompt
    widths: list[tuple[int, int]] = []
    handle = count_forwards(SLM, widths)
    got: Counter[int] = Counter()
    steps, work = 0, {}
    while min(got[key] for key in long) < 8:
        given = batch.step()
        got.update(key for key, *_ in given)
        work.update({key: stats for key, _, stats in given if key in long})
        steps += not any(key in got for key in long)
    handle.remove()
    assert steps >= 220 // 16 and min(got[key] for key in writers) > steps // 2  # each has its tokens meanwhile
    assert max(width for _, width in widths) <= 16 + len(writers)  # side by side
    for name in ("slm_positions", "llm_positions"):  # the second row copies what the first one has read
        assert 220 <= sum(getattr(stats, name) for stats in work.values()) < 220 + 20


def poisoned() -> RoutedGenerator:
    """A pair whose SLM overflows at one token, as half-precision models do on some prompts; neither model writes it."""
    slm, llm = tiny_model(VOCAB, seed=0), tiny_model(VOCAB, seed=1)
    with torch.no_grad():
        slm.get_input_embeddings().weight[5] = torch.inf
        for model in (slm, llm):
            model.lm_head.weight[5] = 0
    generator = RoutedGenerator(slm, llm, TOKENIZER, RandomPolicy(0.3), max_rows=4, llm_wait=2)
    generator.end_ids = [frozenset(), frozenset()]
    return generator


@pytest.mark.parametrize("chunk", [512, 8])
def test_a_row_without_finite_logits_fails_alone_and_leaves_nothing_behind(chunk, monkeypatch):
    monkeypatch.setattr(slots, "SMALLEST", 16)  # while its prompt is read in pieces the row moves to larger classes
    generator = poisoned()
    generator.prefill_chunk = chunk
    prompts = make_prompts(9, seed=2)
    params = [SamplingParams(seed=i, max_tokens=30, temperature=0.5 * (i % 2), top_p=0.5) for i in range(9)]
    expected = [c.token_ids for (c,) in generator.generate(prompts, params)]
    assert not any(5 in ids for ids in expected)
    batch = RoutedBatch(generator)
    tokens: dict[int, list[int]] = {}
    errors: dict[int, RowFailed] = {}
    # Its row is the longest, and the rows that take its place are shorter: masked slots must not be NaN.
    bad = batch.add([7, 5, *[8] * 60], SamplingParams(seed=0, max_tokens=5))
    keys = [batch.add(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    while batch:
        for key, token, _ in batch.step():
            if isinstance(token, RoutedToken):
                tokens.setdefault(key, []).append(token.id)
            else:
                errors[key] = token
    assert list(errors) == [bad] and "The SLM gave logits that are not finite at token 62" in str(errors[bad])
    assert [tokens[key] for key in keys] == expected
    with pytest.raises(ValueError, match="Prompt 1: The SLM gave logits that are not finite"):
        generator.generate([[7], [5]], SamplingParams(max_tokens=3))


def simulated(
    batch: int, wait: int, share: float, span: int, slm: tuple, llm: tuple, pace: Pace | None = None
) -> float:
    """Tokens a second of rows that never end; costs are (fixed, a row). A pace is told what happens and decides."""
    draw, left, tokens, seconds = random.Random(0), [0] * batch, 0, 0.0
    for _ in range(4000):
        others = [r for r in range(batch) if not left[r]]
        if others:
            routed = [r for r in others if draw.random() < share]
            cost = slm[0] + slm[1] * len(others)
            tokens, seconds = tokens + len(others) - len(routed), seconds + cost
            for r in routed:
                left[r] = span
            if pace is not None:
                pace.slm(len(others), len(routed), cost)
        waiting = [r for r in range(batch) if left[r]]
        if waiting and (len(waiting) >= (wait if pace is None else pace.rows(batch)) or len(waiting) == batch):
            cost = llm[0] + llm[1] * len(waiting)
            tokens, seconds = tokens + len(waiting), seconds + cost
            for r in waiting:
                left[r] -= 1
            if pace is not None:
                pace.llm(len(waiting), len(waiting), cost)
    return tokens / seconds


@pytest.mark.parametrize(
    ("batch", "share", "span", "slm", "llm"),
    [
        (16, 0.12, 1, (1.0, 0.0), (10.0, 0.0)),  # both read weights: lock step is no faster than the LLM alone
        (32, 0.05, 1, (1.0, 0.02), (12.0, 0.3)),
        (16, 0.12, 3, (1.0, 0.0), (10.0, 0.1)),
        (16, 0.12, 1, (1.0, 0.1), (0.2, 2.0)),  # the LLM's pass costs by the row: waiting saves nothing
        (4, 0.3, 1, (1.0, 0.0), (3.0, 0.0)),
    ],
)
def test_the_pace_finds_nearly_the_best_number_of_rows(batch, share, span, slm, llm):
    best = max(simulated(batch, wait, share, span, slm, llm) for wait in range(1, batch + 1))
    assert simulated(batch, 0, share, span, slm, llm, Pace()) > 0.94 * best


class Counted(int):
    """A token id that counts how often it is compared."""

    compared = 0
    __hash__ = int.__hash__

    def __eq__(self, other):
        Counted.compared += 1
        return int.__eq__(self, other)


def test_prompts_that_begin_alike_are_not_compared_each_with_each():
    """256 chats with one system prompt of 4,000 tokens would be a billion comparisons."""
    rows, common = 12, 40
    batch = RoutedBatch(endless(NeverLLM(), prefill_chunk=8))
    for i in range(rows):
        prompt = [*[7] * common, 8 + i]
        batch.add([Counted(token) for token in prompt], SamplingParams(max_tokens=60, seed=i))
    Counted.compared = 0
    while batch:
        batch.step()
    assert Counted.compared <= 4 * rows * common


def test_a_row_that_has_been_overtaken_often_enough_is_not_overtaken_behind_another(monkeypatch):
    monkeypatch.setattr(slots, "SMALLEST", 8)
    batch = RoutedBatch(endless(NeverLLM(), token_budget=400))
    batch.add([7] * 150, SamplingParams(max_tokens=200, seed=0))
    batch.step()
    # A younger row that had to give way before it wrote anything is the head of the queue
    for _ in range(2):
        batch.add([8] * 300, SamplingParams(max_tokens=10, seed=0))
    batch.waiting[1].overtaken = MOST_OVERTAKEN
    batch.add([9] * 5, SamplingParams(max_tokens=4, seed=0))
    batch.step()
    assert len(batch.rows) == 1 and [row.overtaken for row in batch.waiting] == [0, MOST_OVERTAKEN, 0]


def test_rows_that_wait_hold_no_counts_of_the_vocabulary():
    batch = RoutedBatch(endless(Toy(), max_rows=1))
    for i in range(3):
        batch.add([7, 8], SamplingParams(max_tokens=4, seed=i, frequency_penalty=0.5))
    batch.step()
    assert [row.penalties is None for row in (*batch.rows, *batch.waiting)] == [False, True, True]


def test_the_pace_is_not_told_of_a_step_that_has_read_a_shared_prompt():
    batch = RoutedBatch(endless(NeverLLM(), llm_wait="auto"))
    for i in range(2):
        batch.add([7] * 200, SamplingParams(max_tokens=9, seed=i))
    batch.step()
    assert not batch._pace._since
    batch.step()
    assert batch._pace._since == 1
