"""The command `tokalign`: help from the source alone, shipped files by name, errors as sentences."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.commands import ROOT
from tokalign.cli.help import verb_help
from tokalign.cli.main import entry, main, with_shipped_config
from tokalign.stage.errors import OptionError

METHODS = {
    "sft": "from_scratch",
    "dpo": "weight_side",
    "critical-dpo": "aggregation",
    "treg": "sequence_weight",
    "structured-grpo": "output_format",
    "token-credit-grpo": "credit_mode",
}


def test_help_of_training_shows_the_methods_own_options_and_imports_no_torch():
    code = "import sys\nfrom tokalign.cli.main import main\n"
    code += f"for verb in {list(METHODS)}: main([verb, '--help'])\n"
    code += "assert not {'torch', 'trl', 'transformers'} & set(sys.modules)\n"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for option in METHODS.values():
        assert f"--{option} (" in shown
    assert "trl.DPOConfig" in shown and "trl.GRPOConfig" in shown and "trl.SFTConfig" in shown


def test_help_says_choices_and_constants_as_a_reader_types_them():
    text = verb_help("tokalign treg", "tokalign.cli.train_treg")
    assert "--base_loss (dpo|simpo; default dpo)" in text
    assert "--signal (str; default token_reward)" in text  # a constant of the trainer's file
    assert "Options of TRegTrainer:" in text


def test_recipes_are_listed_and_copied_once(tmp_path, capsys, monkeypatch):
    main(["recipes"])
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "/" in line.split(" ")[0]}
    assert set(listed) >= {"ledger/sft", "llama-3-8b/critical_dpo", "accelerate_configs/zero3"}
    assert "8 x 80 GB; 11 minutes" in listed["llama-3-8b/critical_dpo"]
    assert not [name for name, line in listed.items() if "; " not in line and "accelerate_configs" not in name]
    copy = main(["recipes", "llama-3-8b/critical_dpo", "--output_dir", str(tmp_path)])
    assert copy == tmp_path / "critical_dpo.yaml"
    assert copy.read_bytes() == (ROOT / "recipes" / "llama-3-8b" / "critical_dpo.yaml").read_bytes()
    copy.write_text("beta: 0.5\n")
    with pytest.raises(OptionError, match="differs"):
        main(["recipes", "llama-3-8b/critical_dpo", "--output_dir", str(tmp_path)])
    assert copy.read_text() == "beta: 0.5\n"


def test_a_config_is_the_local_file_or_else_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = str(ROOT / "recipes" / "ledger" / "sft.yaml")
    assert with_shipped_config(["--config", "recipes/ledger/sft.yaml", "--seed", "1"])[1] == shipped
    assert with_shipped_config(["--config", "ledger/sft"])[1] == shipped
    (tmp_path / "recipes" / "ledger").mkdir(parents=True)
    (tmp_path / "recipes" / "ledger" / "sft.yaml").write_text("seed: 1\n")
    assert with_shipped_config(["--config", "recipes/ledger/sft.yaml"])[1] == "recipes/ledger/sft.yaml"
    with pytest.raises(FileNotFoundError, match="tokalign recipes"):
        with_shipped_config(["--config", "recipes/ledger/soup.yaml"])


NOWHERE = ["--model_name_or_path", "m", "--dataset_name", "no/such/folder"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["recipes", "soup"], "There is no recipe soup"),
        (["recipes", "--soup", "1"], "--soup"),
        (["recipes", "--config", "soup.yaml"], "soup.yaml"),
        (["dpo", "--accelerate_config", "soup"], "zero3"),
        (["critical-dpo", "--output_dir", "x", "--bf16", "false"], "--dataset_name is required"),
        (["dpo", *NOWHERE, "--output_dir", "x", "--bf16", "false"], "does not exist"),
    ],
)
def test_the_console_says_what_is_wrong_and_python_raises_it(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tokalign", *words])
    monkeypatch.delenv("TOKALIGN_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        entry()
    assert isinstance(ended.value.code, str) and sentence in ended.value.code  # Python prints it and exits with 1
    for call in (lambda: main(words), entry):
        monkeypatch.setenv("TOKALIGN_TRACEBACK", "1")
        with pytest.raises((ValueError, OSError), match=sentence):
            call()


def test_a_fault_in_the_code_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tokalign", "recipes"])
    monkeypatch.setattr("tokalign.cli.recipes.shipped_files", lambda: int("no number"))
    with pytest.raises(ValueError, match="invalid literal"):
        entry()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scor"], r"there is no 'scor' \(did you mean score\?\)"),
        (["score", "likelyhood"], r"there is no 'likelyhood' \(did you mean likelihood\?\)"),
    ],
)
def test_a_verb_that_there_is_not(words, said):
    with pytest.raises(SystemExit, match=said):
        main(words)


def test_an_option_that_there_is_not_is_named_with_what_was_meant(tmp_path):
    words = ["dpo", "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    with pytest.raises(OptionError, match=r"there is no option --sginal \(did you mean --signal\?\)"):
        main([*words, "--sginal", "logprob"])
    (tmp_path / "one.yaml").write_text("lerning_rate: 1.0e-5\n")
    with pytest.raises(OptionError, match=r"there is no option --lerning_rate \(did you mean --learning_rate\?\)"):
        main([*words, "--config", str(tmp_path / "one.yaml")])


def test_a_reader_that_has_seen_enough_is_no_error():
    """`tokalign | head -1`: the pipe is closed while the command still writes."""
    program = "from tokalign.cli.main import entry; entry()"
    started = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started.stdout.close()
    assert (started.stderr.read(), started.wait()) == (b"", 1)
