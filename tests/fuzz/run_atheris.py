"""Search the targets for longer than a test may: coverage-guided by atheris, and by hypothesis with other numbers.

    python tests/fuzz/run_atheris.py --seconds 60                       # each target, both searches, 60 s each
    python tests/fuzz/run_atheris.py --seconds 600 --target request --engine atheris
    python tests/fuzz/run_atheris.py --seconds 60 --output runs/fuzz/results.json

atheris starts from the kept seeds and from a few inputs of the strategies. An input that fails is written into
`tests/fuzz/seeds/<target>/`: mend the code, give the file a name that says what it is, and it is a test from then on.
`--output` gets {"arguments", "targets"}, of each target `hypothesis_examples`, `atheris_executions`, `seconds` and
`failures`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
PACKAGE = "tokalign"
STARTS = 40  # inputs of a strategy that the coverage search begins with
SILENCE = 60  # seconds for one input, after which it hangs
MEMORY = 6000  # MB of a process, torch and all


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="of each search of each target")
    parser.add_argument("--target", default="all")
    parser.add_argument("--engine", choices=("both", "atheris", "hypothesis"), default="both")
    parser.add_argument("--output", type=Path, help="results.json to write")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the random numbers")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args, others = parser.parse_known_args()
    if args.child:  # the others are libFuzzer's, which never returns
        fuzz(args.target, others)
    if others:
        parser.error(f"What is {others[0]}?")
    from tests.fuzz.targets import TARGETS

    names = list(TARGETS) if args.target == "all" else [args.target]
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"There is no target {unknown[0]}; targets are {', '.join(TARGETS)}.")
    results: dict[str, Any] = {}
    for name in names:
        started = time.monotonic()
        result: dict[str, Any] = {"hypothesis_examples": 0, "atheris_executions": 0, "failures": []}
        if args.engine in ("both", "hypothesis"):
            result["hypothesis_examples"] = by_hypothesis(name, args.seconds, args.seed, result["failures"])
        if args.engine in ("both", "atheris"):
            result["atheris_executions"] = by_atheris(name, args.seconds, args.seed, result["failures"])
        result["seconds"] = round(time.monotonic() - started, 1)
        results[name] = result
        print(f"{name}: {json.dumps(result)}", flush=True)
        if args.output is not None:  # after each target, so that a killed run keeps what it has
            arguments = {"seconds": args.seconds, "target": args.target, "engine": args.engine, "seed": args.seed}
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps({"arguments": arguments, "targets": results}, indent=2) + "\n")
    if any(result["failures"] for result in results.values()):
        sys.exit(1)


def keep(target: str, data: bytes, error: str) -> dict[str, str]:
    """Write an input that failed among the seeds; what to say of it."""
    from tests.fuzz.targets import SEEDS

    file = SEEDS / target / f"found-{hashlib.sha256(data).hexdigest()[:12]}.bin"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return {"seed": str(file.relative_to(ROOT)), "error": error[:400]}


# ----------------------------------------------------------------------------------------------------------- hypothesis


def by_hypothesis(target: str, seconds: float, seed: int, failures: list[dict[str, str]]) -> int:
    """Rounds of a search until the time is up or one fails, each with other random numbers; how many inputs."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    from tests.fuzz.strategies import STRATEGIES
    from tests.fuzz.targets import TARGETS

    count, end, rounds = 0, time.monotonic() + seconds, 0
    failing: list[bytes] = []

    def once(data: bytes) -> None:
        nonlocal count
        if time.monotonic() > end and not failing:
            return
        count += 1
        try:
            TARGETS[target](data)
        except Exception:
            failing.append(data)
            raise

    options = settings(
        max_examples=500,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    while time.monotonic() < end and not failing:
        try:
            seeded(seed + rounds)(options(given(STRATEGIES[target])(once)))()
        except Exception:  # the last input that failed is the shrunken one
            failures.append(keep(target, failing[-1], _last_lines(traceback.format_exc())))
        rounds += 1
    return count


def _last_lines(text: str) -> str:
    return " | ".join(line.strip() for line in text.strip().splitlines()[-6:])


# -------------------------------------------------------------------------------------------------------------- atheris


def by_atheris(target: str, seconds: int, seed: int, failures: list[dict[str, str]]) -> int:
    """One coverage-guided search in a process of its own (libFuzzer ends the process); how many inputs it ran."""
    from hypothesis import HealthCheck, Phase, given, settings

    from tests.fuzz.strategies import STRATEGIES
    from tests.fuzz.targets import seeds_of

    with tempfile.TemporaryDirectory(prefix="fuzz-corpus-") as name:
        corpus, found = Path(name) / "corpus", Path(name) / "found"
        corpus.mkdir()
        found.mkdir()
        for file in seeds_of(target):
            (corpus / file.name).write_bytes(file.read_bytes())

        @settings(
            max_examples=STARTS,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(STRATEGIES[target])
        def start(data: bytes) -> None:
            (corpus / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)

        start()
        options = [
            f"-max_total_time={seconds}",
            f"-seed={seed % 2**31 or 1}",
            f"-artifact_prefix={found}/",
            f"-timeout={SILENCE}",
            f"-rss_limit_mb={MEMORY}",
            "-print_final_stats=1",
            "-max_len=20000",
            str(corpus),
        ]
        command = [sys.executable, __file__, "--target", target, "--child", *options]
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=ROOT, check=False)
        runs = re.findall(r"number_of_executed_units: (\d+)", ended.stderr) or re.findall(
            r"^#(\d+)", ended.stderr, re.M
        )
        for file in sorted(file for file in found.iterdir() if not file.name.startswith("slow-unit")):
            failures.append(keep(target, file.read_bytes(), _error(ended.stderr + ended.stdout)))
        if ended.returncode != 0 and not failures:
            raise RuntimeError(f"atheris ended with {ended.returncode}: {_last_lines(ended.stderr)}")
        return int(runs[-1]) if runs else 0


def _error(text: str) -> str:
    """The Python error in libFuzzer's report, or how the report ends."""
    return _last_lines(text.partition("Uncaught Python exception")[2].partition("\n==")[0] or text)


def fuzz(target: str, options: list[str]) -> None:
    """The child: libFuzzer over one target, our own modules instrumented as they are imported."""
    import atheris

    with atheris.instrument_imports(include=[PACKAGE]):
        from tests.fuzz.targets import TARGETS

    atheris.Setup([sys.argv[0], *options], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
