"""Byte-level BPE gives every text back; end of text comes from the files; text forges no token."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from hakari.training import tokenizer as module
from hakari.training.text import Document, documents
from hakari.training.tokenizer import (
    END_OF_TEXT,
    decode,
    encode,
    encode_documents,
    load,
    save,
    train,
)

CORPUS = ["stdlib:asyncio/*.py"]
LEARNED = train(documents(CORPUS), 600)


@settings(deadline=None, max_examples=300)
@given(st.text())
def test_any_text_comes_back_exactly(text):
    ids = encode(LEARNED, text)
    assert decode(LEARNED, ids) == text
    assert all(ids != LEARNED.end_of_text)
    assert all(ids < LEARNED.vocabulary)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=30), max_size=20), st.integers(1, 100))
def test_documents_are_encoded_one_by_one_whatever_the_batches(texts, size):
    found = [Document(str(number), text) for number, text in enumerate(texts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH", size)
        pairs = list(encode_documents(LEARNED, found))
    assert [document for document, _ in pairs] == found
    for document, ids in pairs:
        np.testing.assert_array_equal(ids, encode(LEARNED, document.text))


def test_training_learns_as_much_as_asked_and_shortens_text():
    text = "".join(document.text for document in documents(CORPUS))
    assert LEARNED.vocabulary == 600
    assert LEARNED.backend.id_to_token(LEARNED.end_of_text) == END_OF_TEXT
    assert len(encode(LEARNED, text)) < 0.6 * len(text)


def test_little_text_gives_a_smaller_vocabulary():
    assert train([Document("", "abab")], 1000).vocabulary == 257 + 2  # ab, abab


def test_training_is_the_same_with_any_number_of_threads_and_hashes():
    code = (
        "from hakari.training.tokenizer import train; from hakari.training.text import documents;"
        f"print(train(documents({CORPUS!r}), 600).digest)"
    )
    for threads, seed in [("1", "1"), ("2", "7")]:
        env = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == LEARNED.digest


def test_a_vocabulary_without_room_for_the_bytes():
    with pytest.raises(ValueError, match=r"vocabulary = 256 is below 257: 256 bytes and '<\|endof"):
        train([], 256)


def test_what_fails_while_documents_are_read_is_what_the_caller_sees():
    def broken():
        yield Document("a", "text")
        raise ValueError("b.txt is not UTF-8")

    with pytest.raises(ValueError, match=r"^b\.txt is not UTF-8$"):
        train(broken())


def test_the_end_of_text_inside_a_document_is_only_text(tmp_path):
    save(LEARNED, tmp_path)
    for tokenizer in (LEARNED, load(tmp_path)):
        ids = encode(tokenizer, f"one{END_OF_TEXT}two")
        assert tokenizer.end_of_text not in ids
        assert decode(tokenizer, ids) == f"one{END_OF_TEXT}two"


# --- long documents -----------------------------------------------------------------------


def test_a_long_document_is_cut_without_changing_its_tokens(monkeypatch):
    text = "".join(document.text for document in documents(CORPUS))
    whole = LEARNED.backend.encode(text).ids
    monkeypatch.setattr(module, "PIECE", 1000)
    assert len(module._pieces(LEARNED, text)) > len(text) / 3000
    np.testing.assert_array_equal(encode(LEARNED, text), whole)


def across_lines():
    """A tokenizer whose tokens reach over ends of lines: no cut is harmless."""
    letters = {letter: number for number, letter in enumerate("ab\n", 1)}
    pairs = {"b\n": 4, "b\na": 5}
    model = models.BPE(letters | pairs | {"<s>": 0}, [("b", "\n"), ("b\n", "a")])
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(["<s>"])
    return module._tokenizer(backend, "<s>")


def test_a_tokenizer_that_reads_over_lines_gets_the_document_whole(monkeypatch):
    tokenizer, text = across_lines(), "ab\n" * 500
    monkeypatch.setattr(module, "PIECE", 100)
    whole = tokenizer.backend.encode(text).ids
    np.testing.assert_array_equal(encode(tokenizer, text), whole)
    monkeypatch.setattr(module, "_harmless", lambda *_: True)  # the mutant that trusts every cut
    assert len(encode(tokenizer, text)) != len(whole)


# --- loading ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder whose end of text is </s>, id 1, and nothing says so yet."""
    letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = {letter: number for number, letter in enumerate(letters)}
    backend = tokenizers.Tokenizer(models.BPE(tokens, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def set_json(path, **values):
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tokenizer_config.json", {"eos_token": "</s>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "</s>", "lstrip": False}}),
        ("special_tokens_map.json", {"eos_token": "</s>"}),
        ("config.json", {"eos_token_id": 1}),
        ("generation_config.json", {"eos_token_id": [1, 0]}),
    ],
)
def test_the_end_of_text_is_found_in_the_files_of_a_folder(folder, name, values):
    set_json(folder / name, **values)
    assert load(folder).end_of_text == load(folder / "tokenizer.json").end_of_text == 1
    assert load(folder).vocabulary == 258


def test_the_end_of_text_may_be_named(folder):
    assert load(folder, "<s>").end_of_text == 0


def test_a_saved_tokenizer_is_the_same_one(tmp_path):
    save(LEARNED, tmp_path)
    again = load(tmp_path)
    assert (again.digest, again.end_of_text, again.vocabulary) == (
        LEARNED.digest,
        LEARNED.end_of_text,
        LEARNED.vocabulary,
    )
    (tmp_path / "tokenizer_config.json").unlink()
    assert load(tmp_path / "tokenizer.json").end_of_text == LEARNED.end_of_text


def test_truncation_padding_and_templates_of_a_file_lose_and_add_nothing(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load(folder, "</s>")
    for text in ("ab", "longer than four"):
        ids = encode(tokenizer, text)
        assert len(ids) == len(text)
        assert decode(tokenizer, ids) == text


def test_a_folder_that_does_not_say_what_ends_a_text(folder):
    message = "does not say which token ends a text: name one; its special tokens are <s>, </s>"
    with pytest.raises(ValueError, match=message):
        load(folder)
    set_json(folder / "config.json", eos_token_id=99_999)
    with pytest.raises(ValueError, match="does not say which token"):
        load(folder)
    with pytest.raises(
        ValueError, match=r"no token '<eos>' to end a text; its special .* <s>, </s"
    ):
        load(folder, "<eos>")


def test_files_that_are_missing_or_something_else(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer .*tokeniser\.json: did you mean .*z"
    ):
        load(folder / "tokeniser.json")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer\.json in .*\(tokenizer\.model\): old"
    ):
        load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer of the tokenizers"):
        load(folder)
    shutil.copy(folder / "tokenizer.model", folder / "tokenizer.json")
    (folder / "config.json").write_text("{no")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load(folder)


@pytest.mark.slow
def test_transformers_reads_what_is_saved(tmp_path):
    from transformers import AutoTokenizer

    save(LEARNED, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "async def naïve(): ...\n\n    return await x\n"
    assert theirs.eos_token_id == LEARNED.end_of_text
    assert theirs(text, add_special_tokens=False)["input_ids"] == encode(LEARNED, text).tolist()
    assert theirs.decode(theirs(text)["input_ids"]) == text
