"""docs/scale.md is what its script writes, by the libraries' numbers, and the SLURM files start what they say.

Model states against DeepSpeed's estimators, activations against the tensors that a real layer keeps for its backward
pass, costs and bytes against loops and real files; two machines are played on this one by a stand-in for `srun`.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import LlamaConfig, LlamaForCausalLM

from tests.cli.commands import command
from tests.launch.support import ROOT, free_port, launch_environment, write_preferences
from tokalign.cli.main import main
from tokalign.routing.labels.features import write_features
from tokalign.stage.loading import load_stage
from tokalign.stage.shards import counts_of

sys.path.insert(0, str(ROOT / "benchmarks"))

import scale
import scale_memory as memory

PAGE = ROOT / "docs" / "scale.md"
SLURM = ROOT / "accelerate_configs" / "slurm"
ARGUMENTS = scale.ScaleArguments()


def test_the_page_is_what_the_script_writes(tmp_path: Path) -> None:
    output, figure = tmp_path / "scale.md", tmp_path / "memory.png"
    scale.main(scale.ScaleArguments(output=str(output), figure=str(figure)))
    assert PAGE.read_text() == output.read_text(), "run python benchmarks/scale.py, and commit docs/scale.md"
    assert figure.read_bytes().startswith(b"\x89PNG") and (ROOT / "docs/figures/scale_memory.png").exists()
    assert "{" not in output.read_text() and "[[" not in output.read_text()


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("name", memory.CONFIGS)
def test_parameters_are_those_of_the_layers(name: str) -> None:
    """Against a sum over the layers' matrices, and the published size of the checkpoint."""
    published = {"Qwen2.5-1.5B": 1.54e9, "Llama-3-8B": 8.03e9, "Qwen2.5-32B": 32.8e9, "Llama-3-70B": 70.6e9}
    config, shape = memory.CONFIGS[name], memory.shape(name)
    h, f, k = config.hidden_size, config.intermediate_size, shape.key_value
    matrices = [(h, h), (h, k), (h, k), (h, h), (h, f), (h, f), (f, h)]
    layer = sum(a * b for a, b in matrices) + 2 * h + ((h + 2 * k) if "Qwen" in name else 0)  # norms; Qwen's biases
    embeddings = config.vocab_size * h * (1 if config.tie_word_embeddings else 2)
    assert shape.parameters == config.num_hidden_layers * layer + embeddings + h
    assert shape.parameters == pytest.approx(published[name], rel=5e-3)
    assert shape.adapter == config.num_hidden_layers * sum(16 * (a + b) for a, b in matrices)
    assert shape.largest_layer == config.vocab_size * h


def cells(name: str, method: str, stage: str) -> list[float]:
    """A row of the committed page's memory table: states on 8, 16 and 64 GPUs, with steps, and the host's."""
    section = PAGE.read_text().split(f"### {name}\n")[1].split("\n#")[0]
    (row,) = re.findall(rf"^\| {re.escape(method)} \| {re.escape(stage)} \| (.*) \|$", section, re.MULTILINE)
    return [float(cell.strip("~ ").replace(",", "")) for cell in row.split(" | ") if cell.strip("~ ")]


@pytest.mark.parametrize("name", scale.POLICIES)
def test_the_table_has_deepspeeds_estimates(name: str) -> None:
    shape = memory.shape(name)
    gb = {stage: cells(name, "full, log-probs ahead", stage) for stage in memory.STAGES}
    for i, gpus in enumerate(memory.GPUS):
        _, two = estimate_zero2_model_states_mem_needs(shape.parameters, 8, gpus // 8, cpu_offload=False)
        sizes = (shape.parameters, shape.largest_layer, 8, gpus // 8)
        _, three, _ = estimate_zero3_model_states_mem_needs(*sizes, cpu_offload=False, cpu_offload_params=False)
        host, offloaded, _ = estimate_zero3_model_states_mem_needs(*sizes)
        assert gb["2"][i] == pytest.approx(two / 1e9, rel=5e-3, abs=0.06)
        assert gb["3"][i] == pytest.approx(three / 1e9, rel=5e-3, abs=0.06)
        assert gb["3, offload"][i] == pytest.approx(offloaded / 1e9, rel=5e-3, abs=0.06)  # one decimal
        assert gpus > 8 or gb["3, offload"][-1] == pytest.approx(host / 1e9, rel=5e-3, abs=0.06)
        assert gb["0"][i] == pytest.approx(20 * shape.parameters / 1e9, rel=5e-3, abs=0.06)
        copied = cells(name, "full, frozen copy", "3")[i]
        assert copied == pytest.approx((three + 2 * shape.parameters / gpus) / 1e9, rel=5e-3, abs=0.06)


def test_on_one_gpu_the_stages_share_nothing() -> None:
    ones = {stage: memory.model_states(10**9, 10**8, stage, 1)[0] for stage in ("0", "1", "2")}
    assert set(ones.values()) == {20 * 10**9}
    assert memory.model_states(10**9, 10**8, "1", 8)[0] == 6 * 10**9  # weights, gradients, an eighth of 16


def test_a_frozen_base_is_shared_out_by_zero3_alone() -> None:
    shape = memory.shape("Llama-3-8B")
    for stage in memory.STAGES:
        gpu, host = memory.states(shape, "LoRA", stage, 16)
        adapter_gpu, adapter_host = memory.model_states(shape.adapter, shape.largest_layer, stage, 16)
        expected = {"3": shape.parameters / 8, "3, offload": 0}.get(stage, 2 * shape.parameters)
        assert gpu - adapter_gpu == expected
        assert host - adapter_host == (shape.parameters if stage == "3, offload" else 0)  # 2 bytes on 2 machines


def test_what_does_not_fit_is_struck_out_and_named() -> None:
    limits = scale.limits_of(ARGUMENTS)
    shape = memory.shape("Llama-3-70B")
    assert memory.smallest(limits, shape, "full", 8, 2048) == "**none**"
    assert memory.smallest(limits, shape, "LoRA", 8, 2048) == "3"
    assert memory.smallest(memory.Limits(1e15, 1e15), shape, "full", 8, 2048) == "0"
    assert not memory.fits(memory.Limits(1e15, 1e9), shape, "full", "3, offload", 8, 2048)  # the host is full
    by_stage = {row[1]: row for row in memory.memory_rows(limits, shape) if row[0] == memory.METHODS["LoRA"]}
    assert by_stage["2"][5].startswith("~~") and not by_stage["3"][5].startswith("~~")


@pytest.mark.parametrize("inner", [96, 256])
def test_a_layer_keeps_what_the_equation_says(inner: int) -> None:
    """The storages that two layers more keep for the backward pass, counted by PyTorch's own hooks."""
    tokens, kept = 64, {}
    for layers in (1, 3):
        config = LlamaConfig(
            **{"vocab_size": 64, "hidden_size": 128, "intermediate_size": inner, "num_hidden_layers": layers},
            **{"num_attention_heads": 4, "num_key_value_heads": 4},
        )  # as many key heads as heads, or the CPU's attention would copy them
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16).train()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, tuple[int, torch.Tensor]] = {}

        def pack(tensor: torch.Tensor, storages: dict = storages, weights: set[int] = weights) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(torch.randint(64, (1, tokens)), use_cache=False)
        kept[layers] = sum(size for size, _ in storages.values())
    shape = memory.shape_of("small", config)
    measured = (kept[3] - kept[1]) / 2 / tokens
    assert measured == pytest.approx(memory.layer_bytes(shape), rel=0.02)  # the rest: one number a head, norms' means
    assert memory.activations(shape, tokens, checkpointing=False) > memory.activations(
        shape, tokens, checkpointing=True
    )


# --------------------------------------------------------------------------------------- labelling, storage, network


def test_costs_follow_from_a_loop_over_tokens() -> None:
    args = scale.ScaleArguments(prompt_tokens=7, completion_tokens=5, template_tokens=3, continuations=4)
    read = {"log-prob": 0, "contrast (": 0, "contrastive prompting": 0}
    for _ in range(7 + 5):  # prompt and completion, one pass each
        read["log-prob"] += 1
        read["contrast ("] += 2
    for _ in ("better", "worse"):
        read["contrastive prompting"] += 7 + 5 + 3  # the revision prompt quotes both
        read["contrastive prompting"] += 5
    generated = sum(5 - position for position in range(1, 6) for _ in range(4))
    found = scale.passes(args)
    for name, tokens in read.items():
        (key,) = (key for key in found if key.startswith(name))
        assert found[key] == (pytest.approx(tokens / 5), 0)
    assert found["rollout estimate (N = 4)"] == (pytest.approx((7 + 5) / 5), pytest.approx(generated / 5))


def test_gpu_hours_are_operations_over_rate() -> None:
    args = scale.ScaleArguments(peak_tflops=100, prefill=0.5, decode=0.1)
    # 10^9 weights: 2 x 10^9 x 10^6 operations a token read; 5 x 10^13 a second
    assert scale.gpu_hours(args, 1e9, prefill=1) * 3600 == pytest.approx(40)
    assert scale.gpu_hours(args, 1e9, decode=1) * 3600 == pytest.approx(200)
    stages = scale.routing_hours(ARGUMENTS)
    verdict = scale.gpu_hours(ARGUMENTS, 72.7e9, prefill=1450, decode=55)
    assert stages["verdicts: the judge"] == pytest.approx(0.11 * 2 * verdict)


def test_storage_is_what_the_stages_hold(tmp_path: Path) -> None:
    ids, numbers = [list(range(100))] * 3, [[0.5] * 100] * 3
    table = pa.table({"completion_ids": pa.array(ids), "logprobs": pa.array(numbers), "signal": pa.array(numbers)})
    values = [column.combine_chunks().values.nbytes / 300 for column in table.columns]
    assert values == [8, 8, 8]  # what `scale.storage` takes for an id, a log-prob and a signal
    assert scale.storage(ARGUMENTS)["a signal"] == 8
    rows, width, top_k = 50, 24, 10
    arrays = {"hidden": np.ones((rows, width)), "top_logits": np.ones((rows, top_k)), "predicted": np.ones(rows)}
    name = write_features(tmp_path, ["a"], arrays | {"entropy": np.ones(rows)})
    content = (tmp_path / name).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert len(content) - header == rows * scale.feature_bytes(width, top_k)


def test_a_sync_takes_its_bits_over_the_links_rate() -> None:
    assert scale.sync_seconds(16e9, 100) == pytest.approx(1.28)
    tokens_a_second = 8 * 312e12 * 0.1 / (2 * 8e9)
    assert scale.generation_seconds(ARGUMENTS, 8e9) == pytest.approx(512 * 1024 / tokens_a_second)


def test_measured_figures_are_shown_where_they_are() -> None:
    signals = {"contrast": {"tokens_per_scored_token": 4.0}, "random": {"tokens_per_scored_token": 0.0}}
    runs = {"token_credit": {"results": {"targets": {"first_error": {"signals": signals}}}}}
    assert scale.measured(runs) == [["contrast", "4.00", "token_credit"]]
    estimates = {"contrast_tokens": {"mean": 3.5}, "rollout_tokens": {"mean": 1234.5}}
    rows = scale.measured({"critical_dpo_ledger": {"results": {"estimates": estimates}}})
    assert [row[1] for row in rows] == ["3.50", "1,234.50"]


def test_rates_are_those_of_the_speed_run() -> None:
    results = {
        "curves": [
            {
                "what": "contrast",
                "over": "tokens",
                "points": [{"tokens": 5, "seconds": 1}, {"tokens": 900, "seconds": 2}],
            },
            {"what": "contrast", "over": "rows", "points": [{"x": 4, "seconds": 1}]},
        ],
        "routed": [{"pair": ["S", "L"], "batch": 1, "tokens_per_second": {"routed": 7.25}}],
        "ratios": [
            {"name": "contrastive scoring, overhead", "what": "ours / bare", "detail": "short", "value": 1.125},
            {"name": "rollouts", "what": "a / b", "detail": "", "value": 2},
        ],
    }
    assert scale.rates({}) == []
    run = {"machine": {"cpu": "some CPU", "threads": "2 threads"}, "results": results}
    assert [row[:2] for row in scale.rates({"speed": run})] == [
        ["contrast", "450 tokens/s"],
        ["routed, S + L, batch 1", "7.2 tokens/s"],
        ["ours / bare (short)", "1.12 ×"],
    ]


# ---------------------------------------------------------------------------------------------------------- commands


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
    assert re.search(rf"sbatch --nodes=\d accelerate_configs/slurm/{name}.sbatch (recipes|scripts)/\w+\.py", comment)


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
