"""A damaged shard is refused by its readers, and computed again by its job."""

from __future__ import annotations

import random
import shutil

import pytest

from tests.faults.damage import DAMAGES, flipped_bits, spoil, write_stage
from tokalign.stage.errors import ContractError
from tokalign.stage.loading import load_stage

SAID = {
    "cut short": "is damaged .no readable footer.",
    "empty": "is damaged .no readable footer.",
    "a flipped bit in a page": "is damaged .a page cannot be read or fails its checksum.",
    "another job's shard": "was written by another job",
    "another shard of this job": "is shard 0 under another's name",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_stage(folder / "whole")
    write_stage(folder / "other", seed=1)
    return folder


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_shard_is_refused_and_computed_again(whole, tmp_path, kind, capsys):
    stage = tmp_path / "stage"
    shutil.copytree(whole / "whole", stage)
    file = spoil(stage, whole / "other", kind)
    with pytest.raises(ContractError, match=rf"{file.name} {SAID[kind]}.*; delete it and rerun the job"):
        load_stage(stage)
    capsys.readouterr()
    write_stage(stage)
    said = " ".join(capsys.readouterr().err.split())
    assert file.name in said and "it is computed again" in said
    assert load_stage(stage).to_list() == load_stage(whole / "whole").to_list()
    file.unlink()
    write_stage(stage)
    assert load_stage(stage).to_list() == load_stage(whole / "whole").to_list()


def test_no_flipped_bit_passes_with_another_value(whole, tmp_path):
    shutil.copytree(whole / "whole", tmp_path / "stage")
    found = flipped_bits(tmp_path / "stage", 400, random.Random(0))
    assert found["wrong"] == 0 and found["found"] > found["harmless"]
    assert found["plain_wrong"] > 0  # without checksums such a bit is read as another value: the check is needed
