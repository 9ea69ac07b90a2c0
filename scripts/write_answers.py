"""Answer the questions of AlpacaEval 2 or Arena-Hard and write the answer file that their judges read.

The questions file says which benchmark it is: `alpaca_eval.json` (rows with `instruction`), Arena-Hard's
`question.jsonl` of v2 (`uid`, `prompt`) or of v0.1 (`question_id`, `turns`). The answers go to
`<output_dir>/<name>.json` or `.jsonl`; the work is a stage beside it, `<name>.work/`, where a killed run goes on.

python scripts/write_answers.py --questions alpaca_eval.json --output_dir runs/alpaca_eval --name llama-3-8b-treg \
    --model runs/treg --engine vllm
python scripts/write_answers.py --questions arena-hard-auto/data/arena-hard-v2.0/question.jsonl \
    --output_dir arena-hard-auto/data/arena-hard-v2.0/model_answer --name llama-3-8b-treg \
    --model runs/treg --engine vllm

Arena-Hard counts `token_len` of all models with one tokenizer of OpenAI's; here it is the model's own number of tokens.
Its score does not use it, its style control does: run its `utils/add_markdown_info.py` on the file before that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import TrlParser

from tokalign.generation import EngineArguments, load_engine
from tokalign.generation.protocol import Engine, SamplingParams
from tokalign.prompts import render_prompt
from tokalign.stage.errors import ContractError
from tokalign.stage.files import write_text_atomically
from tokalign.stage.hashes import weights_hash
from tokalign.stage.jobs import Dropped, run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.processes import process_state
from tokalign.stage.seeds import problem_seed

TOO_LONG = "question longer than the model can hold"
KEYS = {
    "AlpacaEval": ("instruction",),
    "Arena-Hard v2": ("uid", "prompt"),
    "Arena-Hard v0.1": ("question_id", "turns"),
}
Row = dict[str, Any]


@dataclass
class WriteAnswersArguments:
    """Arguments of answering."""

    questions: str = field(metadata={"help": "alpaca_eval.json, or Arena-Hard's question.jsonl."})
    output_dir: str = field(metadata={"help": "Folder of the answer file (Arena-Hard: data/<benchmark>/model_answer)."})
    name: str = field(metadata={"help": "The model's name in the benchmark's tables, and of the answer file."})
    limit: int | None = field(default=None, metadata={"help": "Answer the first questions only."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message before every question."})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus kept while sampling."})
    max_tokens: int = field(default=4096, metadata={"help": "Most tokens of an answer."})
    seed: int = field(default=0, metadata={"help": "Seed of sampled answers."})
    shard_size: int = field(default=64, metadata={"help": "Questions a shard: one engine call, and what a kill loses."})

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name:
            raise ContractError(f"--name is {self.name!r}; it names the answer file, so leave out any folder.")


def read_questions(path: str) -> tuple[str, list[Row]]:
    """The benchmark of a questions file, and its questions as `id`, `question` and, for AlpacaEval, `dataset`."""
    file = Path(path)
    if not file.is_file():
        raise ContractError(f"There is no questions file {path}; download it from the benchmark and check the path.")
    rows = _json_rows(file)
    keys = rows[0].keys() if rows and isinstance(rows[0], dict) else ()
    benchmark = next((name for name, needed in KEYS.items() if all(key in keys for key in needed)), None)
    if benchmark is None:
        raise ContractError(
            f"The first row of {path} has neither `instruction` (AlpacaEval), `uid` and `prompt`, nor `question_id` "
            "and `turns` (Arena-Hard); give the benchmark's own questions file."
        )
    questions = []
    seen: set[str] = set()
    for number, row in enumerate(rows):
        where = f"Row {number} of {path}"
        missing = [key for key in KEYS[benchmark] if key not in row]
        if missing:
            raise ContractError(f"{where} has no `{missing[0]}`, unlike the rows before it; mend or remove it.")
        identity, text = str(number), row.get("instruction")  # AlpacaEval names its questions by their text
        if benchmark == "Arena-Hard v2":
            identity, text = row["uid"], row["prompt"]
        elif benchmark == "Arena-Hard v0.1":
            if len(row["turns"]) != 1:
                raise ContractError(f"{where} has {len(row['turns'])} turns; only questions of one turn are answered.")
            identity, text = row["question_id"], row["turns"][0]["content"]
        if not isinstance(text, str) or not text.strip():
            raise ContractError(f"{where} holds no question in words; mend or remove it.")
        if identity in seen:
            raise ContractError(f"{where}: the question {identity!r} occurs twice; remove one of them.")
        seen.add(identity)
        made = {"id": identity, "question": text}
        questions.append({**made, "dataset": str(row.get("dataset", ""))} if benchmark == "AlpacaEval" else made)
    return benchmark, questions


def _json_rows(file: Path) -> list[Any]:
    """The objects of a JSON list or of JSON lines."""
    text = file.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ContractError(f"{file} is not JSON ({error}); download it again.") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ContractError(f"Line {number} of {file} is not JSON ({error}); download it again.") from None
    return rows


def answerer(
    engine: Callable[[], Engine], tokenizer: Any, arguments: WriteAnswersArguments
) -> Callable[[list[Row]], list[Row | Dropped]]:
    """The job's function: questions in, answers out."""
    system = [] if arguments.system_prompt is None else [{"role": "system", "content": arguments.system_prompt}]

    def answer(rows: list[Row]) -> list[Row | Dropped]:
        prompts = [render_prompt([*system, {"role": "user", "content": r["question"]}], tokenizer) for r in rows]
        longest = getattr(engine(), "max_length", None)
        kept = [i for i, ids in enumerate(prompts) if longest is None or len(ids) < longest]
        params = [
            SamplingParams(
                temperature=arguments.temperature,
                top_p=arguments.top_p,
                max_tokens=arguments.max_tokens,
                seed=problem_seed(arguments.seed, rows[i]["id"], "evaluation"),
            )
            for i in kept
        ]
        items: list[Row | Dropped] = [Dropped(TOO_LONG) for _ in rows]
        for i, (one,) in zip(kept, engine().generate([prompts[i] for i in kept], params), strict=True):
            items[i] = {
                **rows[i],
                "completion_ids": one.token_ids,
                "finish_reason": one.finish_reason,
                "text": str(tokenizer.decode(one.token_ids, skip_special_tokens=True)).strip(),
            }
        return items

    return answer


def style_of(row: Row) -> Row:
    """Arena-Hard's `metadata` of an answer: its tokens, and its headers, list items and bold spans outside code blocks.

    The style control pairs the entries of two models by their order, so the order is the benchmark's.
    """
    parts = row["text"].split("```")
    prose = parts[::2] if len(parts) % 2 else [*parts[::2], parts[-1]]  # a block that is never closed is no block
    headers = {f"h{level}": 0 for level in range(1, 7)}
    items = {"ordered": 0, "unordered": 0}
    bold = {"**": 0, "__": 0}
    for line in "```".join(prose).splitlines():
        marks = len(line) - len(line.lstrip("#"))
        if 1 <= marks <= 6 and line[marks : marks + 1].isspace():
            headers[f"h{marks}"] += 1
        first = (line.split(maxsplit=1) or [""])[0]
        items["ordered"] += first[:-1].isdigit() and first.endswith(".")
        items["unordered"] += first in ("-", "*", "+")
        for mark in bold:
            bold[mark] += sum(bool(span) for span in line.split(mark)[1:-1:2])
    counts = {"header_count": headers, "list_count": items, "bold_count": bold}
    return {"token_len": len(row["completion_ids"]), **counts}


def entry(benchmark: str, row: Row, name: str, system_prompt: str | None, written: float) -> Row:
    """One entry of the answer file."""
    if benchmark == "AlpacaEval":
        return {
            "dataset": row["dataset"],
            "instruction": row["question"],
            "output": row["text"],
            "generator": name,
        }
    identity = hashlib.sha256(f"{name}\0{row['id']}\0{row['text']}".encode()).hexdigest()[:22]
    if benchmark == "Arena-Hard v2":
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        messages = [
            *system,
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": {"answer": row["text"]}},
        ]
        return {
            "uid": row["id"],
            "ans_id": identity,
            "model": name,
            "messages": messages,
            "tstamp": written,
            "metadata": style_of(row),
        }
    turn = {"content": row["text"], "token_len": len(row["completion_ids"])}
    return {
        "question_id": row["id"],
        "answer_id": identity,
        "model_id": name,
        "choices": [{"index": 0, "turns": [turn]}],
        "tstamp": written,
        "conv_metadata": style_of(row),
    }


def main(arguments: WriteAnswersArguments, engine_arguments: EngineArguments) -> Path:
    state = process_state()
    benchmark, questions = read_questions(arguments.questions)
    work = Path(arguments.output_dir) / f"{arguments.name}.work"
    tokenizer = AutoTokenizer.from_pretrained(
        engine_arguments.tokenizer or engine_arguments.model, trust_remote_code=engine_arguments.trust_remote_code
    )
    models = {"model": engine_arguments.model, "adapter": engine_arguments.adapter}
    hashes: dict[str, str | None] = {}
    if state.is_main_process:  # only this process compares and writes them, and hashing 140 GB takes a while
        for key, path in models.items():
            remote = path is None or (engine_arguments.engine == "openai" and not Path(path).is_dir())
            hashes[key] = path if remote else weights_hash(path)
    settings = ("system_prompt", "temperature", "top_p", "max_tokens", "seed")
    parameters = {"benchmark": benchmark, **{key: getattr(arguments, key) for key in settings}}
    parameters |= {"engine": engine_arguments.engine, "dtype": engine_arguments.dtype, "weights": hashes}
    engines: list[Engine] = []

    def engine() -> Engine:  # loaded by the first unfinished shard: a finished run loads no model
        if not engines:
            engines.append(load_engine(engine_arguments))
        return engines[0]

    try:
        manifest = run_job(
            answerer(engine, tokenizer, arguments),
            Dataset.from_list(questions[: arguments.limit]),
            work,
            name="write_answers",
            parameters=parameters,
            tokenizer=tokenizer,
            shard_size=arguments.shard_size,
            extra_manifest={"models": {key: {"path": models[key], "weights_hash": hashes.get(key)} for key in models}},
        )
    finally:
        for loaded in engines:
            loaded.close()
    alpaca = benchmark == "AlpacaEval"
    file = Path(arguments.output_dir) / f"{arguments.name}{'.json' if alpaca else '.jsonl'}"
    if state.is_main_process:
        answers = load_stage(work).to_list()
        written = (work / "manifest.json").stat().st_mtime  # not the clock: a finished run writes the same file again
        entries = [entry(benchmark, row, arguments.name, arguments.system_prompt, written) for row in answers]
        lines = json.dumps(entries, indent=2) if alpaca else "\n".join(json.dumps(one) for one in entries)
        write_text_atomically(file, lines + "\n")
        cut = sum(row["finish_reason"] == "length" for row in answers)
        print(f"{benchmark}: {len(answers)} of {manifest['rows_in']} answered, {cut} cut by max_tokens; {file}")
    return file


if __name__ == "__main__":
    parser = TrlParser((WriteAnswersArguments, EngineArguments))
    main(*parser.parse_args_and_config())
