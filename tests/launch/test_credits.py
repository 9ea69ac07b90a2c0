"""Credit functions under ZeRO-3 on two processes, each with half of every group, are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.launch.support import launch
from tests.signals.support import save_adapter
from tests.trainers.structured import save_ledger_model

SCRIPT = Path(__file__).parent / "credits.py"


@pytest.mark.slow
def test_two_processes_are_credited_as_one(tmp_path) -> None:
    """Frozen models stay whole where ZeRO-3 divides the policy's weights, and groups are gathered."""
    model = save_ledger_model(tmp_path / "model")
    adapters = [save_adapter(tmp_path / name, model, seed=seed) for seed, name in enumerate(("positive", "negative"))]
    found = {}
    for config, processes in (("cpu.yaml", 1), ("zero3.yaml", 2)):
        (tmp_path / config).mkdir()
        launch(config, SCRIPT, model, *adapters, str(tmp_path / config), num_processes=processes)
        found[config] = torch.load(tmp_path / config / "said.pt")
    one, two = found["cpu.yaml"], found["zero3.yaml"]
    assert set(one["said"]) == set(two["said"])
    for name, (batch,) in one["said"].items():
        for (ids, values), (other_ids, others) in zip(batch, two["said"][name][0], strict=True):
            assert ids == other_ids
            torch.testing.assert_close(
                torch.tensor(values), torch.tensor(others), atol=1e-5, rtol=1e-4, equal_nan=True, msg=name
            )
    for log in (one["log"], two["log"]):  # its continuations are sampled: other ones in each launch
        assert log[0]["credit/rollout_estimate/coverage"] == 1 and log[0]["credit/rollout_estimate/tokens"] > 0
