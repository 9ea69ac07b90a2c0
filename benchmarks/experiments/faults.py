r"""Nothing lost: every offline job and a training killed again and again, and compared with a run left in peace.

    python -m benchmarks.experiments.faults --output_dir runs/benchmarks/faults

Every offline job (and `tokalign data ledger`) and a training run once undisturbed. Then each is killed with SIGKILL at
instants drawn from the time in which that run was at work, and started again with the same command, `--kills` times;
every folder is finished in the end and compared with the undisturbed one: rows in order, counts and manifest, feature
and answer files and weights by their bytes. Models are small and untrained: what is tested is the machinery.
tests/faults is the short form. Writes results.json; docs/results/reliability.md shows it.

Importing PyTorch takes longer than a small job does, so jobs are forked from a server process that has imported it
before (multiprocessing's forkserver; it has one thread and has run nothing). In the fork a verb runs as from the
shell: its own session, its own arguments, as `__main__`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerBase
from trl import TrlParser

from benchmarks.render import FAILS, HOLDS, OPEN, ROOT, Tables, read_json, save, write_json
from tokalign.cli.stages import call
from tokalign.prompts import render_prompt
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import MANIFEST, read_manifest
from tokalign.stage.shards import shard_name
from tokalign.worlds import ledger
from tokalign.worlds.ledger_models import model_config

# What the verbs import, so that a fork finds it there.
PRELOAD = """
    torch transformers datasets peft trl openai matplotlib.figure scipy.stats
    transformers.models.llama.modeling_llama trl.trainer.dpo_trainer safetensors.numpy
    tokalign.stage.jobs tokalign.evaluation tokalign.generation.transformers_engine tokalign.trainers
    tokalign.rewards tokalign.routing.decode.generator tokalign.generation.scorer tokalign.routing.labels.report
""".split()
FORKS = multiprocessing.get_context("forkserver")
CLOCKS = ("seconds", "tokens_per_second", "date")  # manifest entries that no two runs share
KINDS = {
    "mismatches": "other rows",
    "duplicates": "twice",
    "missing": "missing",
    "manifests": "manifests",
    "files": "files",
    "leftovers": "leftovers",
}


def held_locks(out: Path) -> set[Path]:
    """Locks of stages in this folder that some process holds; asks Linux, since trying one would take it."""
    held = {line.split()[5].rpartition(":")[2] for line in Path("/proc/locks").read_text().splitlines()}
    return {lock for lock in out.rglob(".lock") if str(lock.stat().st_ino) in held}


def half_checkpoints(out: Path) -> set[Path]:
    """Checkpoints without the file that is written last."""
    return {folder for folder in out.glob("checkpoint-*") if not (folder / "trainer_state.json").exists()}


@dataclass(frozen=True)
class Job:
    """A verb of `tokalign` (or a script) and its options; `{out}` in them is the folder of the run.

    Args:
        files: what to compare byte by byte beside the rows, as globs under that folder.
        work: what shows in that folder that a process is at work there.
        aim: share of the kills that wait until it is. late: up to how many seconds after that they come.
    """

    name: str
    verb: str
    arguments: tuple[str, ...]
    files: tuple[str, ...] = ()
    work: Callable[[Path], set[Path]] = held_locks
    aim: float = 1.0
    late: float = 0.1


def prepare(cache: Path) -> None:
    """Start the server of all jobs, with their settings: one thread, no accelerator, no hub, a cache of their own."""
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}
    os.environ |= {"COLUMNS": "400", "PYTHONPATH": str(ROOT)}
    FORKS.set_forkserver_preload(list(PRELOAD))
    ensure_running()
    first = FORKS.Process(target=str)  # waits for the imports, which would count as the first job's time
    first.start()
    first.join()
    os.environ.clear()
    os.environ |= before


def log_of(out: Path) -> Path:
    """Where the output of the runs on a folder is kept, beside it."""
    return out.with_name(f"{out.name}.log")


def start(job: Job, out: Path, *, largest_file: int | None = None, log: Path | None = None) -> BaseProcess:
    """Start a job; its output is added to `log` (default: `log_of`).

    Args:
        largest_file: bytes at which a write fails as on a full disk.
    """
    arguments = [part.format(out=out) for part in job.arguments]
    process = FORKS.Process(target=_run, args=(job.verb, arguments, str(log or log_of(out)), largest_file))
    process.start()
    return process


def _run(verb: str, arguments: list[str], log: str, largest_file: int | None) -> None:
    os.setsid()
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    call(verb, arguments)


def finish(process: BaseProcess, job: Job, out: Path, *, timeout: float = 300) -> None:
    """Wait for a job that must succeed."""
    process.join(timeout)
    if process.exitcode != 0:
        kill(process, signal.SIGKILL)
        text = log_of(out).read_text(errors="replace")
        raise RuntimeError(f"{job.name} ended with {process.exitcode} in {out}:\n{text[-4000:]}")


def kill(process: BaseProcess, number: int) -> None:
    """Signal a job and what it has started."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # it has no session of its own yet, or is gone
        if process.is_alive():
            os.kill(process.pid, number)


def undisturbed(job: Job, out: Path) -> tuple[float, float]:
    """Run a job to its end; the seconds after which it was first at work in its folder, and after which it was over."""
    started = time.perf_counter()
    process = start(job, out)
    while process.exitcode is None and not job.work(out):
        time.sleep(0.005)
    begun = time.perf_counter() - started
    finish(process, job, out)
    return begun, time.perf_counter() - started


def disturbed(
    job: Job, want: Path, folder: Path, *, kills: int, window: tuple[float, float], draw: random.Random
) -> dict[str, int]:
    """Kill a job `kills` times; every folder is finished in the end and compared with `want`.

    Args:
        window: begin and end of the work of an undisturbed run in seconds; instants are drawn uniformly from it. A kill
            that is aimed waits on until the job is at work. Runs that turn out faster
            (files are in the machine's cache by then) shorten the window.

    Returns:
        `kills`; `struck`: of these, while the job was at work (checking, working or writing); `runs`: folders that were
        finished in the end and compared; and how often they differed, by KINDS.
    """
    outcome = dict.fromkeys(("kills", "struck", "runs", *KINDS), 0)
    while outcome["kills"] < kills:
        out = folder / f"{job.name}-{outcome['runs']}"
        fresh = True
        while True:
            before = job.work(out)  # half a checkpoint of a former run is no work of this one
            started = time.perf_counter()
            process = start(job, out)
            process.join(draw.uniform(*window))
            # What is tested is a kill in the middle of work: one that came while the job loads a model waits for it
            if draw.random() < job.aim and not job.work(out) - before:
                while process.exitcode is None and not job.work(out) - before:
                    time.sleep(0.001)
                process.join(draw.uniform(0, job.late))
            if outcome["kills"] == kills or process.exitcode is not None:
                finish(process, job, out)
                if fresh:
                    shorter = min(1.0, (time.perf_counter() - started) / window[1])
                    window = (shorter * window[0], shorter * window[1])
                break
            kill(process, signal.SIGSTOP)  # so that what is looked at is what the kill meets
            outcome["struck"] += bool(job.work(out) - before)
            outcome["kills"] += 1
            kill(process, signal.SIGKILL)
            process.join()
            fresh = False
        outcome["runs"] += 1
        for kind, count in differences(job, want, out).items():
            outcome[kind] += count
        shutil.rmtree(out)
    return outcome


def stages(out: Path) -> list[Path]:
    """Folders of a run that a job has written, relative to it."""
    return sorted(file.parent.relative_to(out) for file in out.rglob(MANIFEST))


def rows_of(stage: Path) -> list[str]:
    """Rows of a stage in order, each as JSON (exact: floats are written with all their digits)."""
    count = read_manifest(stage)["shards"]
    tables = [pq.read_table(stage / shard_name(index, count)) for index in range(count)]
    return [json.dumps(row, sort_keys=True) for table in tables for row in table.to_pylist()]


def differences(job: Job, want: Path, out: Path) -> dict[str, int]:
    """How a run differs from the undisturbed one, by kind; all 0 where it does not."""
    counts: Counter[str] = Counter()
    counts["manifests"] += stages(want) != stages(out)
    for stage in stages(want):
        theirs, ours = rows_of(want / stage), rows_of(out / stage)
        there, here = Counter(theirs), Counter(ours)
        counts["missing"] += sum((there - here).values())
        counts["duplicates"] += sum((here - there)[row] for row in here if row in there)
        counts["mismatches"] += sum(count for row, count in here.items() if row not in there)
        counts["mismatches"] += sorted(theirs) == sorted(ours) and theirs != ours  # another order
        counts["manifests"] += _settled(want / stage, want) != _settled(out / stage, out)
    for pattern in job.files:
        names = {file.relative_to(want) for file in want.glob(pattern)}
        assert names, f"{job.name} writes no {pattern}"
        counts["files"] += names != {file.relative_to(out) for file in out.glob(pattern)}
        both = (name for name in names if (out / name).exists())
        counts["files"] += sum((want / name).read_bytes() != (out / name).read_bytes() for name in both)
    counts["leftovers"] += sum(1 for file in out.rglob(".*.tmp"))
    return dict(counts)


def _settled(stage: Path, out: Path) -> str:
    """The manifest without what is not the same in two runs: time, and the folder of the run itself."""

    def without(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: without(item) for key, item in value.items() if key not in CLOCKS}
        return value

    return json.dumps(without(read_manifest(stage)), sort_keys=True).replace(str(out), "{out}")


def shards_in(out: Path) -> tuple[int, int]:
    """Rows and shards of all stages of a run."""
    manifests = [read_manifest(out / stage) for stage in stages(out)]
    return sum(m["rows"] for m in manifests), sum(m["shards"] for m in manifests)


# ---------------------------------------------------------------------------------------------------- inputs and jobs


TRAINING = "critical_dpo"
SIZES = "--train 64 --validation 8 --test 8 --sft 8"
CONTRAST = "--model @/slm --positive @/positive --negative @/negative --dataset @/preferences/pairs"


def job(folder: Path, name: str, verb: str, options: str, *files: str, **how: Any) -> Job:
    """A job on the inputs in `folder`, which is @ in its options."""
    words = f"{options} --output_dir {{out}}".split()
    return Job(name, verb, tuple(word.replace("@", str(folder)) for word in words), files, **how)


def make_inputs(folder: Path) -> Path:
    """Write what the jobs read: problems, models, rollouts, pairs, scores; a folder that is there is used as it is."""
    if (folder / "done").exists():
        return folder

    def make(name: str, verb: str, options: str) -> None:
        maker = job(folder, name, verb, options)
        finish(start(maker, folder / name), maker, folder / name)

    folder.mkdir(parents=True, exist_ok=True)
    make("world", "data ledger", SIZES)
    make("json", "data ledger", f"{SIZES} --problem_rendering json")
    tokenizer = ledger.build_tokenizer()
    _write_models(folder, tokenizer)
    _write_rollouts(folder, tokenizer)
    make("preferences", "pairs", "--dataset @/rollouts")
    make("scored", "score contrast", CONTRAST)
    questions = [{"instruction": row["prompt"][0]["content"]} for row in load_stage(folder / "world" / "train")]
    (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    (folder / "done").touch()
    return folder


def _write_models(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A pair, adapters and a judge with random weights, wide enough that greedy choices are no ties."""
    for seed, (name, preset) in enumerate((("slm", "ledger-slm"), ("llm", "ledger-llm"))):
        torch.manual_seed(seed)
        config = model_config(preset, tokenizer)
        config.initializer_range = 0.2
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for seed, name in enumerate(("positive", "negative")):
        torch.manual_seed(seed)
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(LlamaForCausalLM.from_pretrained(folder / "slm"), lora).save_pretrained(folder / name)
    config = model_config("ledger-slm", tokenizer)
    config.num_labels = 1
    torch.manual_seed(2)
    LlamaForSequenceClassification(config).save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")


def _write_rollouts(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Two right and two wrong solutions of every problem: random models would have no right ones."""

    def answer(rows):
        for row in rows:
            problem, draw = ledger.Problem.from_json(row["ledger"]), random.Random(row["id"])
            prompt, rollouts = render_prompt(row["prompt"], tokenizer), []
            for sample in range(4):
                right = sample % 2 == 0
                text = ledger.solution(problem) if right else ledger.wrong_solution(problem, draw)
                ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
                logprobs = [-draw.random() for _ in ids]
                answered = text.rsplit("####", 1)[1].strip()
                rollout = {"completion_ids": ids, "completion": text, "finish_reason": "stop", "logprobs": logprobs}
                more = {"prompt_ids": prompt, "sample": sample, "extracted": answered, "correct": right}
                rollouts.append({key: row[key] for key in ("id", "prompt", "answer")} | more | rollout)
            yield rollouts

    problems: Dataset = load_stage(folder / "world" / "train")
    run_job(answer, problems, folder / "rollouts", name="solutions", parameters={}, tokenizer=tokenizer)


def jobs_on(folder: Path) -> list[Job]:
    """Every offline job, a builder, and a training."""
    pairs, problems, few = "--dataset @/preferences/pairs", "--dataset @/world/train", "--max_tokens 16"
    pair = f"--slm @/slm {problems} --stop e 1 {few}"
    likelihoods = "--adapter @/positive --signals logprob entropy implicit_reward"

    def of(verb: str, options: str, *files: str) -> Job:
        return job(folder, verb.replace(" ", "_"), verb, options, *files)

    return [
        job(folder, "ledger", "data ledger", "--train 2000 --validation 400 --test 400 --sft 900"),
        of("sample", f"--model @/slm {problems} {few} --num_rollouts 2 --shard_size 4"),
        of("pairs", "--dataset @/rollouts --shard_size 2"),
        of("score contrast", f"{CONTRAST} --shard_size 4"),
        of("score likelihood", f"--model @/slm {likelihoods} {pairs} --shard_size 4"),
        of("reward", "--dataset @/rollouts --reward_model @/judge --shard_size 8"),
        of("score token-reward", f"--model @/slm --templates ledger {pairs} --shard_size 4"),
        of("score rollout", f"--model @/slm {pairs} {few} --n 2 --max_rows 10 --shard_size 1"),
        of("score first-error", f"{pairs} --problems @/world/train --tokenizer @/slm"),
        of("label", f"--model @/llm {pair} --num_problems 24 --shard_size 4", "prefill/features/*.safetensors"),
        of("generate", f"--llm @/llm {pair} --policy random --rate 0.3 --shard_size 4"),
        of(
            "write-answers",
            f"--model @/slm {few} --questions @/questions.json --name small --shard_size 4",
            "small.json",
        ),
        of("evaluate answers", f"--model @/slm --problems @/world/train --split train {few} --shard_size 4"),
        of("evaluate structured", f"--model @/slm --problems @/json/train --split train {few} --shard_size 4"),
        training_job(folder),
    ]


def training_job(folder: Path) -> Job:
    """Critical-token DPO of all weights, with a checkpoint every two steps; one command starts it and goes on.

    Half of the kills wait for a checkpoint that is half written, which takes some thousandths of a second.
    """
    options = """
        --model_name_or_path @/slm --dataset_name @/scored --max_steps 24 --save_steps 2 --save_total_limit 2
        --per_device_train_batch_size 4 --learning_rate 1e-3 --logging_steps 1 --dtype float32 --bf16 false
        --use_cpu true --gradient_checkpointing false --report_to none --disable_tqdm true
        --resume_from_checkpoint true
    """
    how: dict[str, Any] = {"work": half_checkpoints, "aim": 0.5, "late": 0.0}
    return job(folder, TRAINING, "critical-dpo", options, "model.safetensors", **how)


# ------------------------------------------------------------------------------------------------------------ results


@dataclass
class FaultArguments:
    """What to break and how often."""

    output_dir: str = field(default="runs/benchmarks/faults", metadata={"help": "Folder of all; a killed run goes on."})
    kills: int = field(default=20, metadata={"help": "Kills of each job."})
    training_kills: int = field(default=8, metadata={"help": "Kills of the training, half of them while it saves."})
    only: list[str] = field(default_factory=list, metadata={"help": "Names of jobs; all if none is given."})
    seed: int = field(default=0, metadata={"help": "Seed of the instants."})


def main(args: FaultArguments) -> dict[str, Any]:
    out = Path(args.output_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    prepare(out / "cache")
    all_jobs = {job.name: job for job in jobs_on(make_inputs(out / "inputs"))}
    if unknown := [name for name in args.only if name not in all_jobs]:
        raise ValueError(f"--only {unknown[0]}: there is no such job; there are {', '.join(all_jobs)}.")
    jobs = {name: killed(all_jobs[name], out, args) for name in args.only or all_jobs}
    return save(out, {"arguments": asdict(args), "jobs": jobs}, tables)


def killed(job: Job, out: Path, args: FaultArguments) -> dict[str, Any]:
    """What differs after the kills of a job, and how large it is; kept, so that a run that was stopped goes on."""
    kept, kills = out / f"{job.name}.json", args.training_kills if job.name == TRAINING else args.kills
    settings = {"kills": kills, "seed": args.seed}
    if kept.exists() and (former := read_json(kept))["settings"] == settings:
        return former["measured"]
    folder = out / "runs" / job.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    want = folder / "undisturbed"
    window = undisturbed(job, want)
    draw = random.Random(f"{args.seed} {job.name}")
    outcome = disturbed(job, want, folder, kills=kills, window=window, draw=draw)
    rows, shards = shards_in(want)
    shutil.rmtree(folder)
    measured = {"rows": rows, "shards": shards, "undisturbed_seconds": round(window[1], 2), **outcome}
    write_json(kept, {"settings": settings, "measured": measured})
    print(f"{job.name}: {measured}")
    return measured


def tables(results: dict[str, Any]) -> Tables:
    """The claims, and for every job how often it was killed and what differed in the end."""
    columns = ("rows", "shards", "undisturbed_seconds", "kills", "struck", "runs", *KINDS)
    rows = [[f"`{name}`", *(f"{job[key]:,}" for key in columns)] for name, job in results["jobs"].items()]
    jobs = [job for name, job in results["jobs"].items() if name != TRAINING]
    text = "A job killed at any instant and started again equals one never killed"
    claims = [claim_row(text, jobs, "while the job held its folder")]
    if struck := sum(job["struck"] for job in jobs):
        claims[0][1] += f"; at most {100 * highest_rate(struck):.1f} % fail (95 %)"
    if TRAINING in results["jobs"]:
        text = "A training killed at any instant and resumed ends with the same weights, bit for bit"
        claims.append(claim_row(text, [results["jobs"][TRAINING]], "while a checkpoint was written"))
    headings = ("job", "rows", "shards", "s undisturbed", "kills", "struck", "folders", *KINDS.values())
    return {"claims": (("claim", "here", "verdict"), claims), "jobs": (headings, rows)}


def claim_row(text: str, jobs: Sequence[Mapping[str, Any]], when: str) -> list[str]:
    """A claim that nothing differs after kills; without a kill that struck work it cannot be told."""
    kills, struck, runs = (sum(job[key] for job in jobs) for key in ("kills", "struck", "runs"))
    wrong = sum(job[kind] for job in jobs for kind in KINDS)
    here = f"{wrong} differences in {runs} folders after {kills} kills, {struck} of them {when}"
    return [text, here, f"**{OPEN if not struck else FAILS if wrong else HOLDS}**"]


def highest_rate(events: int) -> float:
    """The chance of a failure at which so many events pass without one in 5 of 100 series."""
    return 1 - 0.05 ** (1 / events)


def figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """None: where nothing differs there is nothing to draw."""
    return {}


if __name__ == "__main__":
    main(*TrlParser((FaultArguments,)).parse_args_and_config())
