"""Every file of accelerate_configs/ gives what its first comment says.

Parsed by accelerate's own loader; launched for real with two processes on the CPU where the CPU can show it (plain
data parallel, every ZeRO stage, offload, two machines played by two launchers), FSDP2 by one assignment more; for ddp
and fsdp2 the environment that `accelerate launch` would hand to the workers is built and read.
"""

from __future__ import annotations

import json

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from tests.launch import probe
from tests.launch.support import (
    CONFIGS,
    PROBE,
    ROOT,
    free_port,
    launch,
    launch_command,
    launch_plan,
    start,
    wait,
    write_preferences,
)

NAMES = ["cpu", "ddp", "fsdp2", "multi_node", "zero1", "zero2", "zero3", "zero3_offload"]
# two processes x 2 rows x 2 accumulated = the 8 rows a step of the one-process reference below
TWO_PROCESSES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def test_these_are_all_the_configs() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_parses_the_config(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))  # raises on an unknown key
    assert config.num_processes >= 2
    assert config.use_cpu is False  # true here would silently start one process without DeepSpeed
    comment = path.read_text().split("compute_environment")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert f"accelerate_configs/{name}.yaml" in comment  # the launch command
    # keys inside a nested block are copied onto the launcher's arguments unchecked: a misspelt one would do nothing
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(config.deepspeed_config) | set(config.fsdp_config) <= set(known)


# ---------------------------------------------------------------------------------------------------- dry runs


def worker_environment(name: str, *options: str) -> tuple[dict[str, str], object]:
    """What `accelerate launch` would put into the workers' environment, and its arguments for torchrun."""
    command = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--main_process_port", str(free_port()), *options]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*command, "script.py"]))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        command, environment = prepare_deepspeed_cmd_env(args)
        assert command is None  # torchrun, not DeepSpeed's own ssh launcher
        return environment, args
    return prepare_multi_gpu_env(args), args


def test_ddp_starts_one_process_a_gpu() -> None:
    environment, args = worker_environment("ddp", "--num_processes", "4")
    assert (args.multi_gpu, args.use_deepspeed, args.use_fsdp) == (True, False, False)
    assert args.nproc_per_node == "4"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert args.gpu_ids == "all"


def test_fsdp2_builds_the_version_2_plugin() -> None:
    environment, args = worker_environment("fsdp2", "--num_processes", "8")
    assert args.use_fsdp and args.nproc_per_node == "8"
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    with patch_environment(**{k: v for k, v in environment.items() if k.startswith(("ACCELERATE_", "FSDP_"))}):
        plugin = FullyShardedDataParallelPlugin()  # reads the environment, as it does in a worker
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading is True
    assert type(plugin.cpu_offload).__name__ == "OffloadPolicy"  # its subclass CPUOffloadPolicy would offload


def test_multi_node_gives_each_machine_its_share() -> None:
    environment, args = worker_environment("multi_node", "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 1)
    assert args.rdzv_endpoint.startswith("10.0.0.1:")
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


# ------------------------------------------------------------------------------------------------ real launches


@pytest.fixture(scope="module")
def dataset(tiny_path, tmp_path_factory) -> str:
    return write_preferences(tmp_path_factory.mktemp("signals"), tiny_path, rows=16)


@pytest.fixture(scope="module")
def run(tiny_path, dataset, tmp_path_factory):
    """run(arguments, lora=…) -> one run of a probe's plan, of two steps; outputs go to a folder of its own."""

    def make(arguments: dict, *, lora: bool) -> dict:
        arguments = {"output_dir": str(tmp_path_factory.mktemp("run")), "max_steps": 2} | arguments
        return {
            "method": "critical_token_dpo",
            "model": tiny_path,
            "dataset": dataset,
            "lora": lora,
            "arguments": arguments,
        }

    return make


@pytest.fixture(scope="module")
def one_process_losses(run) -> dict[bool, list[float]]:
    """Losses of one plain process at the same effective batch, keyed by `lora`."""
    losses = {}
    for lora in (False, True):
        (report,) = probe.carry_out([run({"per_device_train_batch_size": 8}, lora=lora)])
        losses[lora] = report["losses"]
        assert losses[lora][0] != losses[lora][1]  # the comparison below sees an update, not only the start
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "distributed_type", "zero_stage", "lora"),
    [
        ("cpu", "MULTI_CPU", None, True),
        ("zero1", "DEEPSPEED", 1, False),
        ("zero3_offload", "DEEPSPEED", 3, False),
    ],
)
def test_two_processes_train_as_one(
    name, distributed_type, zero_stage, lora, run, one_process_losses, tmp_path
) -> None:
    """zero2.yaml and zero3.yaml carry the whole matrix (test_matrix.py)."""
    (seen,) = launch_plan(f"{name}.yaml", tmp_path, [run(TWO_PROCESSES, lora=lora)])
    assert seen["distributed_type"] == distributed_type
    assert seen["num_processes"] == 2
    assert seen["zero_stage"] == zero_stage
    assert seen["losses"] == pytest.approx(one_process_losses[lora], abs=1e-5)
    if zero_stage == 3:
        assert seen["partitioned"]
    if name == "zero3_offload":
        assert seen["offload"] == ["cpu", "cpu"]


@pytest.mark.slow
def test_another_number_of_processes_resumes(run, tmp_path) -> None:
    """One process saves, two go on with `--resume_from_checkpoint true`, then one again: as if never interrupted."""
    saving = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "run")}
    alone = {"per_device_train_batch_size": 8}

    def part(steps: int, batch: dict) -> dict:
        return run(saving | batch | {"max_steps": steps, "resume_from_checkpoint": "true"}, lora=True)

    def saved() -> dict[str, int]:
        return {path.parent.name: path.stat().st_mtime_ns for path in sorted(tmp_path.glob("run/*/trainer_state.json"))}

    (whole,) = probe.carry_out([run(alone | {"max_steps": 3}, lora=True)])
    probe.carry_out([part(1, alone)])
    first = saved()
    (two,) = launch_plan("cpu.yaml", tmp_path, [part(2, TWO_PROCESSES)])
    second = saved()
    (one,) = probe.carry_out([part(3, alone)])
    assert (two["num_processes"], one["num_processes"]) == (2, 1)
    assert one["losses"] == pytest.approx(whole["losses"], abs=1e-5)
    assert len(set(one["losses"])) == 3 and two["losses"] == one["losses"][:2]
    # Nothing was computed again, so nothing was written over: a restart would have given the same losses
    assert [set(times) for times in (first, second, saved())] == [
        {f"checkpoint-{i + 1}" for i in range(n)} for n in (1, 2, 3)
    ]
    assert first.items() < second.items() < saved().items()


@pytest.mark.slow
def test_fsdp2_knows_its_reference_ahead(run, one_process_losses, tmp_path) -> None:
    """The reference's log-probs before training, where nothing is sharded yet: full, and by an adapter's base.

    Sharded over two CPU processes, which accelerate itself would not do (`probe.let_fsdp_have_cpus`).
    """
    ahead = TWO_PROCESSES | {"precompute_ref_log_probs": True}
    runs = [run(ahead, lora=False), run(ahead, lora=True), run(TWO_PROCESSES, lora=True)]
    for seen, lora in zip(launch_plan("fsdp2.yaml", tmp_path, runs), (False, True, True), strict=True):
        assert (seen["distributed_type"], seen["num_processes"], seen["partitioned"]) == ("FSDP", 2, True)
        assert seen["losses"] == pytest.approx(one_process_losses[lora], abs=1e-5)


@pytest.mark.slow
def test_a_recipe_runs_as_documented_without_a_gpu(tiny_path, dataset, tmp_path) -> None:
    """`accelerate launch … recipes/critical_dpo.py --config …` on two CPU processes, by the recipe's own batch."""
    overrides = {
        "model_name_or_path": tiny_path,
        "dataset_name": dataset,
        "output_dir": str(tmp_path),
        "use_cpu": "true",
        "bf16": "false",
        "dtype": "float32",
    }
    arguments = [part for key, value in overrides.items() for part in (f"--{key}", value)]
    recipe = str(ROOT / "recipes" / "llama-3-8b" / "critical_dpo.yaml")
    launch("cpu.yaml", ROOT / "recipes" / "critical_dpo.py", "--config", recipe, *arguments)
    # 16 rows are one step of 2 processes x 2 rows x 4 accumulated, so 3 epochs are 3 steps (one process: 6)
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert any(
        value.any() for key, value in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_B" in key
    )


@pytest.mark.slow
def test_two_machines_train_as_one_process(run, one_process_losses, tmp_path) -> None:
    """Two launchers on this machine, one worker each, stand for two machines."""
    plan, report = tmp_path / "plan.json", tmp_path / "report.json"
    plan.write_text(json.dumps([run(TWO_PROCESSES, lora=True)]))
    options = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    wait(
        [
            start(
                launch_command("multi_node.yaml", PROBE, [str(plan), str(report)], [*options, "--machine_rank", rank])
            )
            for rank in ("0", "1")
        ]
    )
    (seen,) = json.loads(report.read_text())
    assert (seen["distributed_type"], seen["num_processes"], seen["zero_stage"]) == ("DEEPSPEED", 2, 3)
    assert seen["losses"] == pytest.approx(one_process_losses[True], abs=1e-5)
