"""The command `tokalign VERB …`: finds the verb's file, reads its arguments, runs its `main`.

A verb is a module whose `main` takes dataclasses; their fields are its options, on the command line or as a flat YAML
after `--config` (TRL's parser). Help is read from the source (`tokalign.cli.help`), so that it opens at once.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import tokalign
from tokalign.signals.registry import get, names
from tokalign.stage.errors import ContractError, JobError, OptionError
from tokalign.stage.resources import PACKAGE, recipe
from tokalign.trainers.registry import TRAINERS


@dataclass(frozen=True)
class Verb:
    """A row of the help, and the file that does the work; a verb with `parts` has a second word."""

    name: str
    module: str
    text: str
    parts: tuple[Verb, ...] = ()
    first: str = ""  # the option that a bare first word stands for


def _job(name: str, text: str, first: str = "") -> Verb:
    return Verb(name, f"tokalign.cli.{name.replace('-', '_')}", text, first=first)


def _several(name: str, text: str, *parts: Verb) -> Verb:
    return Verb(name, "", text, parts)


def _scorers() -> list[Verb]:
    """A verb for every file of the signal table that computes signals, users' installed ones included."""
    titles: dict[tuple[str, str], list[str]] = {}
    for name in names():
        signal = get(name)
        if signal.module:
            paper = f" (arXiv {signal.paper})" if signal.paper else ""
            titles.setdefault((signal.command.split()[-1], signal.module), []).append(signal.title + paper)
    return [Verb(verb, module, ", ".join(texts)) for (verb, module), texts in titles.items()]


GROUPS: dict[str, tuple[Verb, ...]] = {
    "start": (
        _job("quickstart", "from nothing to a better model and a report, on a laptop"),
        _job("recipes", "list the recipes that ship with the package, copy one", first="name"),
        _job("own-data", "the whole pipeline on GSM8K's text with your model"),
    ),
    "data": (
        _several(
            "data",
            "build problems from a public data set, or from your own file",
            Verb("problems", "tokalign.data.builders.problems", "any JSONL, parquet or hub id with prompt and answer"),
            Verb("gsm8k", "tokalign.data.builders.gsm8k", "GSM8K, word problems"),
            Verb("svamp", "tokalign.data.builders.svamp", "SVAMP, one-step word problems, split by story"),
            Verb("math", "tokalign.data.builders.hendrycks_math", "MATH, competition problems"),
            Verb("ultrafeedback", "tokalign.data.builders.ultrafeedback", "UltraFeedback, open instructions"),
            Verb("gsm8k-json", "tokalign.data.builders.gsm8k_json", "GSM8K answered as JSON"),
            Verb("snips", "tokalign.data.builders.snips", "SNIPS, sentences to a voice assistant as JSON"),
            Verb("bfcl", "tokalign.data.builders.bfcl", "function calls of the Berkeley leaderboard"),
            Verb("cooking", "tokalign.data.builders.cooking", "cooking recipes as JSON"),
            Verb("step-labels", "tokalign.data.builders.step_labels", "solutions with their first wrong step"),
            Verb("ledger", "tokalign.worlds.ledger_builder", "the made-up ledger world"),
            Verb("model", "tokalign.data.builders.model", "a small real model, from the hub or PyPI", first="name"),
        ),
        _job("sample", "sample answers to problems and verify them"),
        _job("reward", "score answers with a reward model or a function"),
        _job("pairs", "make preference pairs of sampled answers"),
        _job("write-answers", "write model answers to prompts as text"),
    ),
    "token signals": (
        _several(
            "score",
            "one number per completion token",
            *_scorers(),
            Verb("first-error", "tokalign.cli.first_error", "the true first wrong token, where a world knows it"),
        ),
        _job("compare", "how well each signal finds the wrong token, and its cost"),
        _job("view", "a page of completions coloured by their signals"),
    ),
    "training": (
        Verb("sft", "tokalign.cli.train_sft", "supervised fine-tuning; positive and negative models"),
        Verb("dpo", "tokalign.cli.train_dpo", "plain DPO, as TRL's, by the same recipe"),
        *(Verb(row.verb, row.main or f"tokalign.trainers.{row.module}", row.text) for row in TRAINERS),
        Verb("router", "tokalign.cli.train_router", "a token router (arXiv 2505.21600)"),
    ),
    "evaluation": (
        _several(
            "evaluate",
            "accuracy with its interval, pass@k, structure, routed pairs",
            Verb("answers", "tokalign.cli.evaluate", "verified answers of models"),
            Verb("structured", "tokalign.cli.evaluate_structured", "structured output"),
            Verb("routing", "tokalign.cli.evaluate_routing", "routed pairs: accuracy against cost"),
        ),
    ),
    "routing": (
        _job("label", "which tokens only the large model should write"),
        _job("calibrate", "give a trained router a threshold for a budget"),
        _job("generate", "answers by a routed pair"),
        _job("serve", "an OpenAI-compatible server over a routed pair"),
        _job("slm-server", "the command of a vLLM server that runs a pair's small model"),
    ),
}
OURS = (ContractError, JobError, OptionError)
ORDINARY = (ValueError, OSError, ImportError)
VERBS = {verb.name: verb for verbs in GROUPS.values() for verb in verbs}


def main(argv: list[str] | None = None) -> Any:
    """Run `tokalign VERB …`; the verb's result is returned, for whoever calls this from Python."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        from tokalign.cli.help import overview

        print(overview(GROUPS))
        return None
    if words[0] in ("-V", "--version", "version"):
        print(f"tokalign {tokalign.__version__}")
        return None
    verb, command, words = find(words)
    if verb.parts:
        from tokalign.cli.help import overview

        print(overview({f"{command} WHAT": verb.parts}, usage=f"{command} WHAT [options]"))
        return None
    if "-h" in words or "--help" in words:
        from tokalign.cli.help import verb_help

        print(verb_help(command, verb.module))
        return None
    if "--accelerate_config" in words:
        from tokalign.cli.launch import launch

        return launch(command.split()[1:], words)
    return run(verb.module, words, command)


def find(words: list[str]) -> tuple[Verb, str, list[str]]:
    """The verb that a command line names, the words that named it, and its options.

    A verb that still has `parts` is one whose second word was left out.
    """
    name, *words = words
    verb, command = VERBS.get(name) or _unknown("tokalign", name, VERBS), f"tokalign {name}"
    if verb.parts and words and words[0] not in ("-h", "--help"):
        parts = {part.name: part for part in verb.parts}
        name, *words = words
        verb, command = parts.get(name) or _unknown(command, name, parts), f"{command} {name}"
    if verb.first and words and not words[0].startswith("-"):
        words = [f"--{verb.first}", *words]
    return verb, command, words


def entry() -> None:
    """The console command: what went wrong by the user's hand is one sentence on stderr and exit code 1.

    `TOKALIGN_TRACEBACK=1` shows where it was raised. Callers from Python have `main`, whose errors are as raised.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, such as `| head`; Python's own flush at exit would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (*OURS, *ORDINARY) as error:
        if os.environ.get("TOKALIGN_TRACEBACK") or not is_said(error):
            raise
        raise SystemExit(str(error) if str(error).startswith("tokalign ") else f"tokalign: {error}") from None


def is_said(error: BaseException) -> bool:
    """Whether an error is a sentence of ours to the user, and not a fault in the code.

    Ours by class, or an ordinary error that our own code raised with a sentence; Python's and the libraries' end
    without a full stop or come from files of theirs.
    """
    if isinstance(error, OURS):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, ORDINARY) and raised_in.is_relative_to(PACKAGE) and str(error).endswith(".")


def run(module: str, words: list[str], command: str = "") -> Any:
    """Read the options of a verb's `main` and call it; the processes of a launch end with it.

    Raises:
        OptionError: an option that there is not, in the YAML, or a value that a configuration refuses.
    """
    function = main_of(module)  # before TRL: the verb may set what torch reads when it is imported
    parser = parser_of(function, command)
    if "--help_all" in words:
        parser.print_help()
        return None
    try:
        options = parser.parse_args_and_config(with_shipped_config(words))
    except ContractError:  # a verb's own check of its options
        raise
    except ValueError as error:
        raise OptionError(f"{command}: {_without_unknown_options(str(error), parser, command)}") from error
    result = function(*options)
    if "torch" in sys.modules:
        from tokalign.stage.processes import end_processes

        end_processes()
    return result


def main_of(module: str) -> Any:
    """A verb's `main`: its file's own, or of a row of the table of trainers the one that all trainings share."""
    own = getattr(import_module(module), "main", None)
    if own is not None:
        return own
    from tokalign.cli.train import main_of_trainer

    return main_of_trainer(module)


def parser_of(function: Any, command: str = "") -> Any:
    """TRL's parser for the dataclasses that a verb's `main` takes."""
    from trl import TrlParser

    classes = [parameter.annotation for parameter in signature(function, eval_str=True).parameters.values()]
    return TrlParser(classes, prog=command or None)


def with_shipped_config(words: list[str]) -> list[str]:
    """`--config recipes/…` where there is no such file here is the one that the package ships."""
    words = list(words)
    if "--config" in words[:-1]:
        at = words.index("--config") + 1
        if not Path(words[at]).is_file():
            words[at] = str(recipe(words[at]))
    return words


def _without_unknown_options(said: str, parser: Any, command: str) -> str:
    """The parser's error; where it names options that there are not, a sentence that a user of the command can use."""
    if "not used by the HfArgumentParser" not in said and "Unknown arguments from config file" not in said:
        return said
    word = next(iter(re.findall(r"--?([A-Za-z]\w*)", said)), None)
    if word is None:  # a bare word where an option was expected
        return said
    known = [option.name for kind in parser.dataclass_types for option in fields(kind)]
    return f"there is no option --{word}{_did_you_mean(word, known, '--')}; see `{command} --help`."


def _did_you_mean(word: str, known: Iterable[str], before: str = "") -> str:
    close = get_close_matches(word, known, n=1)
    return f" (did you mean {before}{close[0]}?)" if close else ""


def _unknown(command: str, word: str, verbs: dict[str, Verb]) -> Any:
    meant = _did_you_mean(word, verbs)
    raise SystemExit(f"{command}: there is no {word!r}{meant}; there are {', '.join(verbs)}. See `{command} --help`.")
