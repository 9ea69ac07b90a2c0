"""Constrained decoding: whatever the model, a completion that ended is a document of its own schema."""

import dataclasses
import importlib.util
import json
import random

import jsonschema_rs
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support import ALPHABET, SPECIAL_TOKENS, tiny_model, tiny_tokenizer
from tokalign.generation import EngineArguments, SamplingParams, continue_from_prefixes, load_engine
from tokalign.generation.constrained import Grammars, is_byte_encoded, needs_leading_space, spelled_out, spellings
from tokalign.generation.protocol import generate_with_early_bans
from tokalign.generation.transformers_engine import TransformersEngine
from tokalign.worlds.ledger import JSON_SCHEMA, build_tokenizer

LEDGER = json.dumps(JSON_SCHEMA)
PERSON = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 4}, "old": {"type": "boolean"}},
        "required": ["name", "old"],
        "additionalProperties": False,
    }
)
NUMBER = json.dumps({"type": "integer", "minimum": 10, "maximum": 500})
DIGIT = json.dumps(
    {
        "type": "object",
        "properties": {"n": {"enum": [1, 22, -3]}, "ok": {"const": "yes"}},
        "required": ["n", "ok"],
        "additionalProperties": False,
    }
)


def character_tokenizer():
    return tiny_tokenizer(ALPHABET + "{}[]_\\")


def byte_tokenizer():
    """Byte-level, as GPT-2's and Qwen's are, without merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(SPECIAL_TOKENS + letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
    )


TOKENIZERS = {
    "characters": character_tokenizer,
    "bytes": byte_tokenizer,
    "words": build_tokenizer,
    "word pieces": lambda: build_tokenizer(digits="split"),
}


def engine_of(tokenizer, backend="xgrammar", seed=0, **arguments):
    model = tiny_model(len(tokenizer) + 7, seed=seed)  # a padded vocabulary, as many checkpoints have
    return TransformersEngine(
        EngineArguments("", grammar_backend=backend, **arguments), model=model, tokenizer=tokenizer
    )


def prompts_of(count, tokenizer):
    draw = random.Random(0)
    return [[draw.randrange(6, len(tokenizer)) for _ in range(draw.randrange(1, 20))] for _ in range(count)]


def documents(tokenizer, results, schemas):
    """How many completions ended; each of them must be a document of its schema."""
    ended = 0
    for completions, schema in zip(results, schemas, strict=True):
        for completion in completions:
            assert completion.finish_reason == "stop" or len(completion.token_ids) > 0
            if completion.finish_reason == "stop":
                text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
                assert jsonschema_rs.is_valid(json.loads(schema), json.loads(text)), text
                ended += 1
    return ended


@pytest.mark.parametrize(("backend", "kind"), [*(("xgrammar", kind) for kind in TOKENIZERS), ("llguidance", "bytes")])
def test_what_has_ended_is_a_document_of_its_own_schema(backend, kind):
    tokenizer = TOKENIZERS[kind]()
    engine = engine_of(tokenizer, backend, token_budget=1000)  # small: rows leave and join
    schemas = [[PERSON, DIGIT], [LEDGER, NUMBER if kind == "word pieces" else LEDGER]]["word" in kind] * 8
    prompts = prompts_of(len(schemas), tokenizer)
    each = [SamplingParams(n=3, seed=i, max_tokens=120, json_schema=s) for i, s in enumerate(schemas)]
    results = engine.generate(prompts, each)
    assert documents(tokenizer, results, schemas) > 24


def test_both_libraries_allow_the_same_here():
    tokenizer = byte_tokenizer()
    params = SamplingParams(n=4, seed=3, max_tokens=60, json_schema=DIGIT)
    first, second = (
        engine_of(tokenizer, backend).generate(prompts_of(4, tokenizer), params)
        for backend in ("xgrammar", "llguidance")
    )
    assert first == second


def test_free_and_bound_rows_share_a_batch_and_change_nothing_for_each_other():
    tokenizer = character_tokenizer()
    engine = engine_of(tokenizer)
    prompts = prompts_of(12, tokenizer)
    each = [
        SamplingParams(
            n=1 + i % 2,
            seed=i,
            temperature=(0.0, 1.0)[i % 2],
            max_tokens=40,
            json_schema=(None, PERSON, DIGIT)[i % 3],
            banned_token_ids=tuple(tokenizer.convert_tokens_to_ids(list(" \n"))),
        )
        for i in range(12)
    ]
    together = engine.generate(prompts, each)
    for prompt, params, expected in zip(prompts, each, together, strict=True):
        (alone,) = engine.generate([prompt], params)
        assert [c.token_ids for c in alone] == [c.token_ids for c in expected]
        for c in expected:
            assert not set(c.token_ids) & set(params.banned_token_ids)
    free = engine.generate(prompts[::3], [dataclasses.replace(p, json_schema=None) for p in each[::3]])
    assert [[c.token_ids for c in r] for r in free] == [[c.token_ids for c in r] for r in together[::3]]


@torch.no_grad()
def test_a_greedy_step_takes_the_best_allowed_token_and_logprobs_stay_the_models_own():
    tokenizer = character_tokenizer()
    engine = engine_of(tokenizer)
    prompt = prompts_of(1, tokenizer)[0]
    banned = tuple(tokenizer.convert_tokens_to_ids(list(" \n")))
    params = SamplingParams(temperature=0, max_tokens=40, json_schema=DIGIT, banned_token_ids=banned)
    ((completion,),) = engine.generate([prompt], params)
    written = [f'{{"n":{n},"ok":"yes"}}' for n in (1, 22, -3)]  # all documents there are without white space
    assert completion.finish_reason == "stop"
    for t, (token, logprob) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        so_far = tokenizer.decode(completion.token_ids[:t])
        going = [text[len(so_far)] for text in written if text.startswith(so_far) and text != so_far]
        allowed = tokenizer.convert_tokens_to_ids(going) or [tokenizer.eos_token_id]
        logits = engine.model(torch.tensor([prompt + completion.token_ids[:t]])).logits[0, -1]
        assert token == max(allowed, key=lambda i: float(logits[i]))
        assert logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=2e-5)


def test_a_words_spelling_is_what_it_decodes_to_after_a_word():
    tokenizer = build_tokenizer(digits="split")
    texts, spaced = spellings(tokenizer, len(tokenizer) + 2)
    spelled = dict(zip(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), texts, strict=False))
    assert spaced and texts[-2:] == [b"", b""]
    assert [spelled[name] for name in ("7", "@@7", ",", '"name"', "-", "<|end|>")] == [
        b" 7", b"7", b",", b' "name"', b" -", b""
    ]  # fmt: skip
    # Where no digit can follow, a minus that stands alone would be a dead end.
    whole = build_tokenizer()
    assert spellings(whole, len(whole))[0][whole.convert_tokens_to_ids("-")] == b""
    assert not needs_leading_space(character_tokenizer()) and not is_byte_encoded(character_tokenizer())
    assert is_byte_encoded(byte_tokenizer()) and not needs_leading_space(byte_tokenizer())


def test_two_numbers_side_by_side_are_not_one(tmp_path):
    """`1` `2` reads "12" as bytes and decodes to "1 2", which is no JSON."""
    tokenizer = build_tokenizer()
    schema = json.dumps({"type": "array", "items": {"type": "integer"}})
    matcher = Grammars("xgrammar", tokenizer, len(tokenizer), [tokenizer.eos_token_id]).matcher(schema, 0)
    for token in tokenizer.convert_tokens_to_ids(["[", "1"]):
        matcher.accept(token)
    bits = torch.zeros(1, -(-len(tokenizer) // 32), dtype=torch.int32)
    matcher.fill(bits, 0)
    allowed = [name for name, i in tokenizer.get_vocab().items() if bits[0, i // 32] >> (i % 32) & 1]
    assert sorted(allowed) == ["\n", ",", "]"]


def test_the_copy_for_vllm_has_the_same_ids_and_text(tmp_path):
    for digits in ("whole", "split"):
        tokenizer = build_tokenizer(digits=digits)
        assert spelled_out(tokenizer, str(tmp_path / digits))
        copy = PreTrainedTokenizerFast.from_pretrained(tmp_path / digits)
        assert len(copy) == len(tokenizer) and copy.eos_token_id == tokenizer.eos_token_id
        document = {"steps": [{"name": "Anna", "left": 12, "op": "+", "right": 3, "total": 15}], "answer": 15}
        ids = tokenizer.encode(json.dumps(document), add_special_tokens=False)
        assert json.loads(copy.decode(ids)) == document
    assert not spelled_out(character_tokenizer(), str(tmp_path)) and not spelled_out(byte_tokenizer(), str(tmp_path))


def test_bad_schemas_and_combinations_are_refused(monkeypatch):
    for text in ("{", "[]", "3", "[" * 100_000):
        with pytest.raises(ValueError, match=r"json_schema is .* give the JSON text of an object"):
            SamplingParams(json_schema=text)
    with pytest.raises(ValueError, match="llguidance takes byte-level and byte-fallback tokenizers only: use xgrammar"):
        engine_of(build_tokenizer(), "llguidance").generate([[7]], SamplingParams(json_schema=DIGIT))
    tokenizer = byte_tokenizer()
    for backend in ("xgrammar", "llguidance"):
        engine = engine_of(tokenizer, backend)
        with pytest.raises(ValueError, match=r"Prompt 1 has a json_schema that cannot be decoded by \(.+\): correct"):
            engine.generate([[7], [8]], [SamplingParams(max_tokens=1), SamplingParams(json_schema='{"type": "foo"}')])
        brace = tokenizer.convert_tokens_to_ids("{")
        with pytest.raises(ValueError, match="Prompt 0 has come to a place where no token is left"):
            engine.generate([[7]], SamplingParams(json_schema=DIGIT, banned_token_ids=(brace,), seed=0))
        # A row that is done has nothing to come to: the ban makes the closing brace impossible.
        close = tokenizer.convert_tokens_to_ids("}")
        (short,), (long,) = engine.generate(
            [[7], [7]],
            [
                SamplingParams(json_schema=DIGIT, banned_token_ids=(close,), seed=0, max_tokens=1),
                SamplingParams(max_tokens=30, seed=0, banned_token_ids=(1,)),
            ],
        )
        assert (len(short.token_ids), len(long.token_ids)) == (1, 30)
    params = SamplingParams(json_schema=DIGIT)
    with pytest.raises(ValueError, match="Prefix length 2 has a json_schema, which would start anew"):
        continue_from_prefixes(engine, [7], [8, 9], [2], params)
    early = SamplingParams(json_schema=DIGIT, banned_token_ids=(7,), banned_steps=1)
    with pytest.raises(ValueError, match="Prompt 0 has both banned_steps and json_schema"):
        generate_with_early_bans(lambda prompts, each: [], [[7]], [early])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"json_schema needs xgrammar: install tokalign\[constrained\]"):
        engine_of(tokenizer).generate([[7]], params)


def test_a_grammar_is_compiled_once_for_many_requests(monkeypatch):
    import xgrammar

    compiled = []
    plain = xgrammar.Grammar.from_json_schema
    monkeypatch.setattr(xgrammar.Grammar, "from_json_schema", lambda schema: compiled.append(schema) or plain(schema))
    engine = engine_of(character_tokenizer())
    for _ in range(2):
        engine.generate(
            [[7], [8], [9]],
            [SamplingParams(n=2, max_tokens=3, json_schema=s) for s in (PERSON, DIGIT, PERSON)],
        )
    assert compiled == [PERSON, DIGIT]


def test_a_server_is_sent_the_schema_and_refuses_a_spaced_tokenizer(tmp_path):
    from types import SimpleNamespace

    from tokalign.generation.openai_engine import OpenAIEngine

    for name, tokenizer in (("characters", character_tokenizer()), ("words", build_tokenizer())):
        tokenizer.save_pretrained(tmp_path / name)
    arguments = EngineArguments(str(tmp_path / "characters"), engine="openai", base_urls=["http://127.0.0.1:1/v1"])
    engine = OpenAIEngine(arguments)
    sent = []

    def complete(body):
        sent.append(json.loads(body))
        logprobs = {"token_logprobs": [-1.0]}
        return {"choices": [{"index": 0, "token_ids": [7], "logprobs": logprobs, "finish_reason": "stop"}]}

    engine._servers = [SimpleNamespace(complete=complete)]
    engine.generate([[7], [8]], [SamplingParams(json_schema=DIGIT), SamplingParams()])
    assert sorted([request.get("structured_outputs") for request in sent], key=str) == [None, {"json": DIGIT}]
    words = OpenAIEngine(dataclasses.replace(arguments, model=str(tmp_path / "words")))
    with pytest.raises(ValueError, match="Prompt 1 has a json_schema, which a server cannot hold this word-level"):
        words.generate([[7], [8]], [SamplingParams(), SamplingParams(json_schema=DIGIT)])


@pytest.mark.slow
def test_vllm_agrees_on_the_ledgers_tokenizer(tmp_path):
    """One start of vLLM, with the tokenizer that needs most care: decoded with spaces, digits split."""
    pytest.importorskip("vllm")
    tokenizer = build_tokenizer(digits="split")
    tokenizer.save_pretrained(tmp_path)
    tiny_model(len(tokenizer), hidden_size=128).save_pretrained(tmp_path)
    engines = [
        load_engine(EngineArguments(str(tmp_path), engine=name, dtype="float32")) for name in ("transformers", "vllm")
    ]
    prompts = prompts_of(12, tokenizer)
    schemas = [(LEDGER, NUMBER, None)[i % 3] for i in range(12)]
    greedy = [SamplingParams(temperature=0, max_tokens=60, json_schema=s) for s in schemas]
    ours, theirs = (engine.generate(prompts, greedy) for engine in engines)
    assert [[c.token_ids for c in r] for r in ours] == [[c.token_ids for c in r] for r in theirs]
    for (a,), (b,), schema in zip(ours, theirs, schemas, strict=True):
        if schema is None:
            assert a.logprobs == pytest.approx(b.logprobs, abs=5e-4)
        else:  # vLLM's are over the allowed ids alone, ours the model's own
            assert all(x < y + 5e-4 for x, y in zip(a.logprobs, b.logprobs, strict=True))
    drawn = [dataclasses.replace(p, temperature=1.0, n=4, seed=i, max_tokens=200) for i, p in enumerate(greedy)]
    bound = [i for i, schema in enumerate(schemas) if schema is not None]
    results = engines[1].generate([prompts[i] for i in bound], [drawn[i] for i in bound])
    assert documents(tokenizer, results, [schemas[i] for i in bound]) > 16
    with pytest.raises(ValueError, match=r"Prompt 0 has a json_schema that cannot be decoded by \(Unsupported type"):
        engines[1].generate(prompts[:1], SamplingParams(json_schema='{"type": "foo"}'))
    assert engines[1].generate(prompts[:1], greedy[0])[0][0].token_ids == theirs[0][0].token_ids
    engines[1].close()
