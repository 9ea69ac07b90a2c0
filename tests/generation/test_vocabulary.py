"""Which ids two models share, and which end a completion."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import ALPHABET, tiny_tokenizer
from tokalign.generation.vocabulary import check_pair, end_ids, stored_generation_config, unknown_ids

END = 1


def test_end_ids_are_the_models_and_the_tokenizers(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    assert end_ids(stored_generation_config(tiny_path), tokenizer) == {END}
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    model.generation_config.eos_token_id = [4, 5]
    model.save_pretrained(tmp_path)
    assert end_ids(stored_generation_config(tmp_path), tokenizer) == {END, 4, 5}
    (tmp_path / "generation_config.json").unlink()
    assert end_ids(stored_generation_config(tmp_path), tokenizer) == {END}


def test_a_pair_shares_the_ids_below_both_vocabularies_and_may_differ_in_chat_template(caplog):
    slm, llm = tiny_tokenizer(), tiny_tokenizer()
    llm.chat_template = "another"
    llm.add_special_tokens({"pad_token": "<|padding|>"})
    assert len(slm) == 89 and len(llm) == 90
    assert check_pair(slm, llm, 80, 128) == 80
    assert "both models read chats as that of the SLM" in caplog.text
    caplog.clear()
    check_pair(slm, tiny_tokenizer(), 80, 128)
    assert not caplog.text
    assert check_pair(slm, llm, 128, 85) == 85
    assert check_pair(slm, llm, 96, 128) == 89  # what pads both models is an id of neither
    assert unknown_ids(llm, 93) == [90, 91, 92] and unknown_ids(slm, 80) == []
    assert (slm.chat_template, llm.chat_template) == (tiny_tokenizer().chat_template, "another")
    with pytest.raises(ValueError, match=r"The SLM's tokenizer .* is not the LLM's .*: route between") as error:
        check_pair(slm, tiny_tokenizer(ALPHABET[::-1]), 96, 96)
    assert "\n" not in str(error.value)
