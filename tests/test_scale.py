"""docs/scale.md's commands are read by their scripts, and the SLURM files start what they say.

Two machines are played on this one by a stand-in for `srun`.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.cli.commands import command
from tests.launch.support import ROOT, free_port, launch_environment, write_preferences
from tokalign.cli.main import main
from tokalign.stage.loading import load_stage
from tokalign.stage.shards import counts_of

PAGE = ROOT / "docs" / "scale.md"
SLURM = ROOT / "accelerate_configs" / "slurm"


def documented_commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("words", documented_commands(), ids=lambda words: " ".join(words)[:60])
def test_documented_command_is_read_by_its_script(words: list[str]) -> None:
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if words[0] == "accelerate":
        launch_command_parser().parse_args([*words[2:at], words[at]])
    else:
        assert words[0] == "sbatch" and (ROOT / words[at - 1]).is_file()
    command(words).read()


def assumption(name: str) -> float:
    """A value of the table that the page ends with."""
    (value,) = re.findall(rf"^\| `{name}` \| ([\d.,]+) \|", PAGE.read_text(), re.MULTILINE)
    return float(value.replace(",", ""))


def labelling_hours(slm: float, llm: float, tokens: float, differ: float) -> dict[str, float]:
    """GPU-hours of routing labels by the page's formula: 2 operations a weight and token, at a share of the peak.

    Args:
        slm, llm: parameters.
        tokens: of the LLM's answers.
        differ: share of them where the SLM's choice is another.
    """

    def hours(parameters: float, *, read: float = 0.0, written: float = 0.0) -> float:
        passes = read / assumption("prefill") + written / assumption("decode")
        return 2 * parameters * passes / (assumption("peak_tflops") * 1e12) / 3600

    problems = tokens * assumption("prompt_tokens") / assumption("answer_tokens")  # tokens of their prompts
    asked = differ * tokens * assumption("judge_orders")
    prompts, replies = asked * assumption("judge_prompt"), asked * assumption("judge_reply")
    return {
        "answers": hours(llm, read=problems, written=tokens),
        "prefill": hours(slm, read=problems + tokens),
        "branches": hours(llm, written=differ * tokens * assumption("branch_tokens")),
        "verdicts": hours(1e9 * assumption("judge_billions"), read=prompts, written=replies),
    }


def test_the_pages_hours_of_routing_labels_follow_its_formula() -> None:
    ours = labelling_hours(1_543_714_304, 32_763_876_352, 1e6, assumption("differ"))
    stages = {
        "answers": "answers: ",
        "prefill": "prefill: ",
        "branches": "branches by sentences",
        "verdicts": "verdicts: ",
    }
    for stage, row in stages.items():
        (stated,) = re.findall(rf"^\| {row}[^|]*\| ([\d.]+) \|", PAGE.read_text(), re.MULTILINE)
        assert float(stated) == pytest.approx(ours[stage], rel=0.005)


@pytest.mark.parametrize(
    ("recipe", "slm", "llm"),
    [
        ("deepseek-r1-distill-qwen-1.5b-32b", 1.54e9, 32.76e9),
        ("qwen3-0.6b-8b", 0.6e9, 8.19e9),
        ("qwen3-1.7b-32b", 1.72e9, 32.76e9),
    ],
)
def test_a_recipes_hours_are_those_of_the_page(recipe: str, slm: float, llm: float) -> None:
    """On its eight GPUs, for the tokens and the share of differences that it states; so in the table of recipes."""
    text = " ".join((ROOT / "recipes" / recipe / "label_routing.yaml").read_text().replace("#", " ").split())
    tokens = float(re.search(r"\(([\d.]+) M tokens\)", text)[1]) * 1e6
    differ = float(re.search(r"(\d+) % differ", text)[1]) / 100
    hours = {stage: gpus / 8 for stage, gpus in labelling_hours(slm, llm, tokens, differ).items()}
    for stage, ours in hours.items():
        assert abs(float(re.search(rf"{stage} ([\d.]+)", text)[1]) - ours) < max(0.1, 0.01 * ours), stage
    table = re.search(
        rf"\| `{recipe}`.* (\d+) hours, (\d+) of them the judge", (ROOT / "recipes" / "README.md").read_text()
    )
    stated = (float(re.search(r"Time: (\d+) hours", text)[1]), hours["verdicts"])
    assert [float(number) for number in table.groups()] == pytest.approx(stated, abs=1)
    assert stated[0] == pytest.approx(sum(hours.values()), abs=1)


SRUN = """#!/bin/bash
# Runs the command once a machine, as srun does, and fails if one fails.
[[ $1 == --kill-on-bad-exit=1 ]] && shift
for ((rank = 0; rank < SLURM_NNODES; rank++)); do SLURM_NODEID=$rank "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || exit 1; done
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then for ((i = 0; i < SLURM_NNODES; i++)); do echo "127.0.0.$((i + 1))"; done; fi
if [[ $1 == requeue ]]; then echo "$2" >"$RECORD/requeued"; fi
"""
ACCELERATE = """#!/bin/bash
printf '%s\\n' "$@" >"$RECORD/$SLURM_NODEID"
"""


def slurm(tmp_path: Path, **stand_ins: str) -> dict[str, str]:
    """Environment of a job's batch script on the first of two machines with three GPUs each."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, **stand_ins}.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    environment = {k: v for k, v in launch_environment().items() if not k.startswith("SLURM_")}
    return environment | {
        "PATH": f"{tmp_path / 'bin'}:{environment['PATH']}",
        "RECORD": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "3",
        "MASTER_PORT": str(free_port()),
    }


@pytest.mark.parametrize("name", ["train", "label"])
def test_a_slurm_file_is_bash_and_asks_to_be_requeued(name: str) -> None:
    file = SLURM / f"{name}.sbatch"
    subprocess.run(["bash", "-n", str(file)], check=True)
    directives = re.findall(r"^#SBATCH (.*)$", file.read_text(), re.MULTILINE)
    assert {"--requeue", "--signal=B:USR1@120", "--ntasks-per-node=1", "--open-mode=append"} <= set(directives)
    comment = " ".join(line.lstrip("# ").rstrip("\\") for line in file.read_text().splitlines()[:8])
    assert re.search(
        rf"sbatch --nodes=\d accelerate_configs/slurm/{name}.sbatch (-m tokalign|(recipes|scripts)/\w+\.py)", comment
    )


@pytest.mark.parametrize("name", ["train", "label"])
def test_every_machine_gets_its_launcher(name: str, tmp_path: Path) -> None:
    environment = slurm(tmp_path, accelerate=ACCELERATE)
    given = ["script.py", "--text", "two words", "--empty", ""]
    subprocess.run(["bash", str(SLURM / f"{name}.sbatch"), *given], env=environment, check=True, timeout=60)
    for rank in range(2):
        command, *words = (tmp_path / str(rank)).read_text().split("\n")[:-1]
        assert command == "launch"
        args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        if name == "train":
            args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            workers = prepare_deepspeed_cmd_env(args)[1]
            assert workers["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
        else:
            prepare_multi_gpu_env(args)
            assert args.multi_gpu and not args.use_deepspeed
        assert (args.nnodes, args.nproc_per_node, args.node_rank, args.num_processes) == ("2", "3", rank, 6)
        assert args.rdzv_endpoint == f"127.0.0.1:{environment['MASTER_PORT']}"
        resumed = ["--resume_from_checkpoint", "true"] if name == "train" else []
        assert [args.training_script, *args.training_script_args] == given + resumed


@pytest.mark.parametrize("name", ["train", "label"])
def test_a_failed_machine_fails_the_job(name: str, tmp_path: Path) -> None:
    failing = "#!/bin/bash\n[[ $SLURM_NODEID == 0 ]] || exit 3\n"
    environment = slurm(tmp_path, accelerate=failing)
    ended = subprocess.run(["bash", str(SLURM / f"{name}.sbatch"), "script.py"], env=environment, timeout=60)
    assert ended.returncode == 1


@pytest.mark.parametrize("name", ["train", "label"])
def test_a_warned_job_is_requeued(name: str, tmp_path: Path) -> None:
    environment = slurm(tmp_path, accelerate='#!/bin/bash\ntouch "$RECORD/started$SLURM_NODEID"; exec sleep 60\n')
    job = subprocess.Popen(
        ["bash", str(SLURM / f"{name}.sbatch"), "script.py"], env=environment, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 30
        while not all((tmp_path / f"started{rank}").exists() for rank in (0, 1)) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(job.pid, signal.SIGUSR1)  # --signal=B: the batch shell alone
        assert job.wait(timeout=30) != 0
    finally:
        os.killpg(job.pid, signal.SIGKILL)  # the steps, which SLURM would end
    assert (tmp_path / "requeued").read_text() == "4711\n"


@pytest.mark.slow
def test_two_machines_label_as_one_process(tiny_path: str, tmp_path: Path) -> None:
    """label.sbatch as it is, with the real launcher: two machines of one process each, on this one's CPU."""
    dataset = write_preferences(tmp_path / "pairs", tiny_path, rows=12)
    arguments = ["--model", tiny_path, "--dataset", dataset, "--shard_size", "2", "--dtype", "float32"]
    command = ["scripts/score.py", "likelihood", *arguments]
    environment = slurm(tmp_path) | {"GPUS_PER_NODE": "1"}
    launched = ["bash", str(SLURM / "label.sbatch"), *command, "--output_dir", str(tmp_path / "two")]
    ended = subprocess.run(launched, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-4000:]
    main(["score", "likelihood", *arguments, "--output_dir", str(tmp_path / "one")])
    two, one = (load_stage(tmp_path / name) for name in ("two", "one"))
    assert len(one) == 12 and two.to_list() == one.to_list()
    files = sorted((tmp_path / "two").glob("*.parquet"))
    processes = {counts_of(file)["process"] for file in files}
    assert processes == {0, 1}  # both machines worked
