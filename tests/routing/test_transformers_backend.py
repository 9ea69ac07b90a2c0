"""The asyncio backend: concurrent requests, cancellation, errors and closing, on the batch that `generate` uses."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from tests.routing.test_generator import LLM, SLM, TOKENIZER, VOCAB, Toy, make_prompts
from tests.routing.test_schedule import poisoned
from tests.support import tiny_model
from tokalign.generation.protocol import SamplingParams
from tokalign.routing.decode.backend import RowFailed
from tokalign.routing.decode.generator import RoutedGenerator
from tokalign.routing.decode.policies import NeverLLM
from tokalign.routing.decode.schedule import RoutedBatch
from tokalign.routing.decode.slots import CachedModel
from tokalign.routing.decode.transformers_backend import MOST_FAILURES, TransformersBackend

FOREVER = SamplingParams(max_tokens=400, seed=3, temperature=0.7)


def backend(policy=None, **options) -> TransformersBackend:
    return TransformersBackend(RoutedGenerator(SLM, LLM, TOKENIZER, policy or Toy(), **options))


async def until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within 10 s")


def never_ending(monkeypatch) -> None:
    """Tiny random models write their end token sooner or later; without it a request is there to be cancelled."""
    make = RoutedGenerator.__init__

    def init(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.end_ids = [set(), set()]

    monkeypatch.setattr(RoutedGenerator, "__init__", init)


@pytest.mark.parametrize("verify", [False, True])
def test_concurrent_requests_get_what_generate_gives(verify):
    prompts = make_prompts(10)
    params = [SamplingParams(n=2, seed=i, max_tokens=12) for i in range(10)]
    expected = RoutedGenerator(SLM, LLM, TOKENIZER, Toy(), verify=verify).generate(prompts, params)

    async def one(server, prompt, p, k):
        return [token async for token in server.generate(prompt, p, sample=k)]

    async def main():
        server = backend(max_rows=6, verify=verify)
        assert (server.threshold, server.max_length, server.degraded) == (0.5, 512, False)
        assert await server.llm_healthy()
        jobs = [(one(server, prompt, p, k)) for prompt, p in zip(prompts, params, strict=True) for k in range(2)]
        results = await asyncio.gather(*jobs)
        assert not server._in_flight and not server._batch
        stats = server.stats
        await server.close()
        assert server.stats == stats and not server._worker.is_alive()
        return results, stats

    results, stats = asyncio.run(main())
    for tokens, c in zip(results, [c for completions in expected for c in completions], strict=True):
        assert [t.id for t in tokens] == c.token_ids and [t.by_llm for t in tokens] == c.written_by
        assert [t.finish_reason for t in tokens] == [None] * (len(tokens) - 1) + [c.finish_reason]
    assert stats.tokens == sum(map(len, results))
    assert stats.llm_tokens == sum(t.by_llm for tokens in results for t in tokens)


def test_closing_the_iterator_frees_the_row(monkeypatch):
    never_ending(monkeypatch)

    async def main():
        server = backend(max_rows=1)
        first = server.generate([7, 8], FOREVER)
        await anext(first)
        second = asyncio.create_task(anext(server.generate([9], FOREVER)))  # waits for the only row
        await asyncio.sleep(0.05)
        assert not second.done() and len(server._in_flight) == 2
        await first.aclose()
        await second
        abandoned = asyncio.create_task(anext(server.generate([9, 9], FOREVER)))
        await asyncio.sleep(0.05)
        abandoned.cancel()  # a client that hangs up while it waits
        await until(lambda: len(server._in_flight) <= 1)
        await server.close()
        assert not server._batch and not server._in_flight

    asyncio.run(main())


def test_the_threshold_holds_from_the_next_decision_on(monkeypatch):
    never_ending(monkeypatch)

    async def main():
        server = backend(Toy(threshold=2.0))
        tokens = []
        stream = server.generate([7, 8], FOREVER)
        async for token in stream:
            tokens.append(token)
            if len(tokens) == 5:
                await server.set_threshold(0.0)
                with pytest.raises(ValueError, match="threshold is not a number"):
                    await server.set_threshold(math.nan)
                assert server.threshold == 0.0
        await server.close()
        return tokens

    written = [token.by_llm for token in asyncio.run(main())]
    assert len(written) == 400 and not any(written[:5])
    change = written.index(True)
    assert all(written[change:])


def test_closing_ends_open_requests_with_an_error(monkeypatch):
    never_ending(monkeypatch)

    async def main():
        server = backend()
        stream = server.generate([7, 8], FOREVER)
        await anext(stream)
        await server.close()
        with pytest.raises(RuntimeError, match="closed while the request was running"):
            async for _ in stream:
                pass
        with pytest.raises(RuntimeError, match="The backend was closed: start another one"):
            await anext(server.generate([7], FOREVER))
        assert not await server.llm_healthy()

    asyncio.run(main())


def test_bad_requests_are_refused_at_once_and_a_broken_model_reaches_every_request():
    broken = tiny_model(VOCAB)
    weight = broken.lm_head.weight.detach().clone()

    async def main():
        server = TransformersBackend(RoutedGenerator(broken, LLM, TOKENIZER, NeverLLM()))
        with pytest.raises(ValueError, match="Prompt 0 is empty"):
            await anext(server.generate([], FOREVER))
        with torch.no_grad():
            broken.lm_head.weight.fill_(torch.nan)
        calls = [anext(server.generate(prompt, FOREVER)) for prompt in ([7], [8, 9])]
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, RowFailed) and "not finite" in str(error)
        with torch.no_grad():
            broken.lm_head.weight.copy_(weight)
        tokens = [t async for t in server.generate([7, 8], replace(FOREVER, max_tokens=3))]  # and it goes on
        assert tokens[-1].finish_reason is not None
        await server.close()

    asyncio.run(main())


def test_a_poison_prompt_ends_alone():
    async def all_of(server, prompt, params):
        return [token.id async for token in server.generate(prompt, params)]

    async def main():
        server = TransformersBackend(poisoned())
        params = replace(FOREVER, max_tokens=60, top_p=0.5)
        expected = await all_of(server, [7, 8, 9], params)
        neighbour = asyncio.create_task(all_of(server, [7, 8, 9], params))
        with pytest.raises(RowFailed, match="not finite"):
            await all_of(server, [7, 5, 8], params)
        assert await neighbour == expected and server.dead is None
        await server.close()

    asyncio.run(main())


def test_an_error_while_cancelling_ends_the_requests_in_flight_and_the_next_is_served(monkeypatch):
    never_ending(monkeypatch)
    drop = CachedModel.drop
    faults = [torch.OutOfMemoryError("injected")]

    def faulty(self, row):  # giving back a row's memory may need memory
        if faults:
            raise faults.pop()
        drop(self, row)

    async def main():
        server = backend()
        await anext(leaving := server.generate([7, 8], FOREVER))
        await anext(staying := server.generate([9], FOREVER))
        monkeypatch.setattr(CachedModel, "drop", faulty)
        await leaving.aclose()
        with pytest.raises(RuntimeError, match=r"failed \(OutOfMemoryError: injected\): send it again"):
            async for _ in staying:
                pass
        short = replace(FOREVER, max_tokens=3)
        assert len([token async for token in server.generate([7, 8], short)]) == 3
        assert await server.llm_healthy() and server.dead is None
        await server.close()

    asyncio.run(main())


def test_a_backend_whose_steps_all_fail_says_that_it_is_dead(monkeypatch):
    async def ask(server):
        return [token.id async for token in server.generate([7, 8], FOREVER)]

    def broken(self, rows, tokens, **options):
        raise ZeroDivisionError("no device")

    async def main():
        server = backend()
        with monkeypatch.context() as patch:
            patch.setattr(CachedModel, "extend", broken)
            for number in range(MOST_FAILURES):
                assert server.dead is None and await server.llm_healthy()
                reason = "has ended" if number == MOST_FAILURES - 1 else "send it again"
                with pytest.raises(RuntimeError, match=reason):
                    await ask(server)
        await until(lambda: not server._worker.is_alive())
        assert isinstance(server.dead, ZeroDivisionError) and not await server.llm_healthy()
        assert not server._batch and not server._in_flight
        with pytest.raises(RuntimeError, match=r"has ended \(ZeroDivisionError: no device\): start another one"):
            await ask(server)  # at once, and not when a time limit strikes
        await server.close()

    asyncio.run(main())


def test_a_failed_step_ends_what_has_begun_and_what_waits_for_a_place_goes_on(monkeypatch):
    never_ending(monkeypatch)
    extend, faults = CachedModel.extend, []

    def faulty(self, *args, **options):
        if faults:
            raise faults.pop()
        return extend(self, *args, **options)

    async def all_of(server, prompt, params):
        return [token.id async for token in server.generate(prompt, params)]

    async def main():
        server = backend(max_rows=1)
        short = replace(FOREVER, max_tokens=4)
        expected = [await all_of(server, prompt, short) for prompt in ([7, 8], [9])]
        await anext(begun := server.generate([7, 8, 9], FOREVER))
        waiting = [asyncio.create_task(all_of(server, prompt, short)) for prompt in ([7, 8], [9])]
        await until(lambda: len(server._in_flight) == 3)
        monkeypatch.setattr(CachedModel, "extend", faulty)
        faults.append(torch.OutOfMemoryError("injected"))
        with pytest.raises(RuntimeError, match="send it again"):
            async for _ in begun:
                pass
        assert await asyncio.gather(*waiting) == expected
        await server.close()

    asyncio.run(main())


def test_a_request_that_cannot_be_queued_is_told_and_the_next_is_served(monkeypatch):
    add, faults = RoutedBatch.add, [MemoryError("injected")]

    def faulty(self, *args, **options):
        if faults:
            raise faults.pop()
        return add(self, *args, **options)

    async def all_of(server):
        return [token.id async for token in server.generate([7, 8], replace(FOREVER, max_tokens=3))]

    async def main():
        server = backend()
        monkeypatch.setattr(RoutedBatch, "add", faulty)
        with server._changed:  # the worker finds both at once
            both = [asyncio.create_task(all_of(server)) for _ in range(2)]
            await asyncio.sleep(0)
        failed, served = await asyncio.wait_for(asyncio.gather(*both, return_exceptions=True), 20)
        assert isinstance(failed, RuntimeError) and "MemoryError" in str(failed) and served
        await server.close()

    asyncio.run(main())


def test_event_loops_do_not_wait_for_a_row_to_be_freed(monkeypatch):
    never_ending(monkeypatch)
    drop, free = CachedModel.drop, []

    async def main():
        server = backend()

        def lock() -> bool:
            got = server._changed.acquire(timeout=5)
            if got:
                server._changed.release()
            return got

        def watched(self, row):  # on a real model this copies keys and values
            with ThreadPoolExecutor(1) as other:
                free.append(other.submit(lock).result())
            drop(self, row)

        monkeypatch.setattr(CachedModel, "drop", watched)
        await anext(stream := server.generate([7, 8], FOREVER))
        await stream.aclose()
        await until(lambda: not server._in_flight and not server._batch)
        assert free == [True, True]
        await server.close()

    asyncio.run(main())
