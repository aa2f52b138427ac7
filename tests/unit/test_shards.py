"""Shards hold every document once, appear whole or not at all, and any damage is named."""

from __future__ import annotations

import json
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from hakari.training import shards
from hakari.training.shards import open_shards, prepare, read_index, take
from hakari.training.text import PART, documents
from hakari.training.tokenizer import END_OF_TEXT, decode, encode, load, save, train

TEXTS = [f"Document {n}: " + " ".join(str(n * k) for k in range(n % 7 + 1)) for n in range(60)]
SETTINGS = {
    "column": "text",
    "tokenizer": None,
    "vocabulary": 300,
    "validation": 0.2,
    "seed": 5,
    "shard_tokens": 200,
}


def rows(path, texts):
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path):
    return rows(tmp_path / "text.jsonl", TEXTS)


def made(source, folder, **changes):
    return prepare([str(source)], folder=folder, **(SETTINGS | changes))


@pytest.fixture
def prepared(source, tmp_path):
    return made(source, tmp_path / "tokens")


def texts_of(folder, split):
    tokens = open_shards(folder, split)
    tokenizer = load(folder)
    found = []
    for start, stop in zip(tokens.starts[:-1], tokens.starts[1:], strict=True):
        separator, *ids = take(tokens, np.arange(start, stop)).tolist()
        assert separator == tokens.end_of_text == tokenizer.end_of_text
        found.append(decode(tokenizer, ids))
    return found


# --- what is in a folder --------------------------------------------------------------------


def test_every_document_stands_in_one_split_in_order_behind_its_separator(prepared):
    split = {name: texts_of(prepared, name) for name in ("train", "validation")}
    assert sorted(split["train"] + split["validation"]) == sorted(TEXTS)
    assert split["train"] == [text for text in TEXTS if text in split["train"]]
    assert 4 <= len(split["validation"]) <= 20  # 12 expected; sd 3.1


def test_the_index_counts_what_the_files_hold(prepared):
    index = read_index(prepared)
    assert index.documents == 60
    assert index.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert index.vocabulary == load(prepared).vocabulary <= 300
    assert index.tokenizer == load(prepared).digest
    assert index.dtype == "<u2"
    assert {path.name for path in prepared.iterdir()} == {
        "index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        *(shard.file for split in index.splits.values() for shard in split),
        *(shard.file.replace(".bin", ".len") for s in index.splits.values() for shard in s),
    }


def test_a_document_never_crosses_shards_and_shards_keep_to_their_size(prepared):
    shard_sizes = [shard.tokens for shard in read_index(prepared).splits["train"]]
    tokens = open_shards(prepared, "train")
    assert len(shard_sizes) == 3
    assert max(shard_sizes) <= SETTINGS["shard_tokens"]
    assert set(tokens.begins) <= set(tokens.starts)
    assert tokens.count == sum(shard_sizes)


def test_a_document_longer_than_a_shard_gets_one_for_itself(source, tmp_path):
    folder = made(source, tmp_path / "one", shard_tokens=1)
    for split, found in read_index(folder).splits.items():
        assert {shard.documents for shard in found} == {1}
        assert texts_of(folder, split) == texts_of(made(source, tmp_path / "tokens"), split)


def test_the_size_of_shards_changes_no_token(source, prepared, tmp_path):
    one = open_shards(made(source, tmp_path / "one", shard_tokens=10**9), "train")
    many = open_shards(prepared, "train")
    assert len(one.shards) == 1 < len(many.shards)
    order = np.random.default_rng(0).permutation(one.count)
    np.testing.assert_array_equal(take(one, order), take(many, order))
    np.testing.assert_array_equal(take(one, order), one.shards[0][order])
    np.testing.assert_array_equal(one.starts, many.starts)


def test_a_large_vocabulary_takes_four_bytes(source, tmp_path):
    learned = train([])
    words = [f"w{number}" for number in range(2**16)]
    learned.backend.add_tokens(words)
    save(learned, tmp_path)
    text = rows(tmp_path / "text.jsonl", [f"w{n}" for n in (1, 2**16 - 1, 2**15)] + TEXTS)
    folder = made(text, tmp_path / "tokens", tokenizer=tmp_path / "tokenizer.json")
    assert read_index(folder).dtype == "<u4"
    assert "w65535" in texts_of(folder, "train") + texts_of(folder, "validation")


def test_a_loaded_tokenizer_is_used_as_it_is(source, tmp_path):
    learned = train([], 257)
    save(learned, tmp_path)
    folder = made(source, tmp_path / "tokens", tokenizer=str(tmp_path), vocabulary=999)
    assert read_index(folder).tokenizer == learned.digest
    tokens = open_shards(folder, "train")
    ids = take(tokens, np.arange(tokens.starts[0] + 1, tokens.starts[1]))
    np.testing.assert_array_equal(ids, encode(learned, texts_of(folder, "train")[0]))


def test_the_tokenizer_is_learned_on_training_documents_only(source, prepared, tmp_path):
    kept = texts_of(prepared, "train")
    alone = train(shards.documents([str(rows(tmp_path / "kept.jsonl", kept))], "text"), 300)
    everything = train(shards.documents([str(source)], "text"), 300)
    assert read_index(prepared).tokenizer == alone.digest != everything.digest


# --- the split ------------------------------------------------------------------------------


def test_the_split_depends_on_text_and_seed_not_on_order(source, prepared, tmp_path):
    mixed = random.Random(0).sample(TEXTS, len(TEXTS))
    other = made(rows(tmp_path / "mixed.jsonl", mixed), tmp_path / "tokens")
    assert set(texts_of(other, "validation")) == set(texts_of(prepared, "validation"))
    reseeded = made(source, tmp_path / "tokens", seed=6)
    assert set(texts_of(reseeded, "validation")) != set(texts_of(prepared, "validation"))


def test_more_text_moves_no_document_to_the_other_split(prepared, tmp_path):
    more = rows(tmp_path / "more.jsonl", [*TEXTS, *(f"new {n}" for n in range(50))])
    other = made(more, tmp_path / "tokens")
    assert set(texts_of(prepared, "validation")) <= set(texts_of(other, "validation"))
    assert set(texts_of(prepared, "train")) <= set(texts_of(other, "train"))


def test_equal_documents_are_never_on_both_sides(tmp_path):
    folder = made(rows(tmp_path / "twice.jsonl", TEXTS * 3), tmp_path / "tokens")
    kept, held = (texts_of(folder, split) for split in ("train", "validation"))
    assert len(kept) + len(held) == 3 * len(TEXTS)
    assert not set(kept) & set(held)


def test_of_few_documents_one_is_kept_for_validation(source, tmp_path):
    folder = made(source, tmp_path / "tokens", validation=0.0001)
    kept = len(texts_of(folder, "validation"))
    assert 1 <= kept <= 3  # the share is a short number, not the smallest
    assert len(texts_of(folder, "train")) == 60 - kept


def test_an_empty_split_names_the_share_that_would_fill_it(source, tmp_path):
    message = r"validation = 0.99999 of 60 documents leaves none for training: 0\.\d+ would keep"
    with pytest.raises(ValueError, match=message):
        made(source, tmp_path / "tokens", validation=0.99999)


def test_one_document_cannot_be_split(tmp_path):
    source = rows(tmp_path / "one.jsonl", ["a text", "a text"])
    message = "validation = 0.2 of 2 documents, all the same, leaves nothing to divide: give more"
    with pytest.raises(ValueError, match=message):
        made(source, tmp_path / "tokens")


# --- prepared once, whole or not at all -------------------------------------------------------


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_settings_give_the_same_bytes_and_are_prepared_once(source, prepared, tmp_path):
    calls = []
    again = made(source, tmp_path / "tokens", progress=lambda *call: calls.append(call))
    assert again == prepared
    assert calls == []
    assert bytes_of(made(source, tmp_path / "elsewhere")) == bytes_of(prepared)


def test_whatever_changes_the_result_changes_its_name(source, prepared, tmp_path):
    changes = [{"vocabulary": 301}, {"validation": 0.3}, {"seed": 6}, {"shard_tokens": 201}]
    names = {made(source, tmp_path / "tokens", **change).name for change in changes}
    assert len(names | {prepared.name}) == 5
    rows(source, [*TEXTS, "one more"])
    assert made(source, tmp_path / "tokens") != prepared


def test_progress_tells_documents_and_bytes_of_each_pass(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "EVERY", 200)
    calls = []
    made(source, tmp_path / "tokens", progress=lambda *call: calls.append(call))
    size = sum(len(text.encode()) for text in TEXTS)
    for stage in ("tokenizer", "tokens"):
        counts = [call[1:] for call in calls if call[0] == stage]
        assert len(counts) > 5
        assert counts == sorted(counts)
        assert counts[-1] == (60, size)


@pytest.mark.parametrize("stage", ["tokenizer", "tokens"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_preparation_leaves_nothing(source, tmp_path, stage, error):
    def stop(name, *_):
        if name == stage:
            raise error

    with pytest.raises(error):
        made(source, tmp_path / "tokens", progress=stop)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_failure_at_the_last_moment_leaves_nothing(source, tmp_path, monkeypatch):
    def no(*_):
        raise OSError("disk full")

    monkeypatch.setattr(shards, "_write_index", no)
    with pytest.raises(OSError, match="disk full"):
        made(source, tmp_path / "tokens")
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_process_that_comes_second_throws_its_own_away(source, tmp_path):
    winners = []

    def race(stage, *_):
        if stage == "tokens" and not winners:
            winners.append(made(source, tmp_path / "tokens"))
            winners.append((winners[0] / "index.json").stat().st_mtime_ns)

    loser = made(source, tmp_path / "tokens", progress=race)
    assert loser == winners[0]
    assert (loser / "index.json").stat().st_mtime_ns == winners[1]
    assert list((tmp_path / "tokens").iterdir()) == [loser]


def test_two_processes_may_prepare_the_same_at_once(source, tmp_path):
    arguments = [[str(source)], *SETTINGS.values()]
    arguments.insert(-1, tmp_path / "tokens")  # before shard_tokens
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        calls = [pool.submit(prepare, *arguments) for _ in range(2)]
        first, second = (call.result(timeout=60) for call in calls)
    assert first == second
    assert list((tmp_path / "tokens").iterdir()) == [first]
    assert sorted(texts_of(first, "train") + texts_of(first, "validation")) == sorted(TEXTS)


def test_a_target_that_cannot_be_written_says_so(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        made(source, tmp_path / "file")


def test_settings_out_of_range(source, tmp_path):
    with pytest.raises(ValueError, match=r"validation = 1\.0 is not a share between 0 and 1"):
        made(source, tmp_path, validation=1.0)
    with pytest.raises(ValueError, match=r"shard_tokens = 0 is below 1"):
        made(source, tmp_path, shard_tokens=0)


# --- damage -----------------------------------------------------------------------------------


def opened(folder):
    return [open_shards(folder, split) for split in ("train", "validation")]


def test_one_changed_byte_anywhere_is_refused_by_name(prepared):
    for path in sorted(prepared.iterdir()):
        if path.name == "tokenizer_config.json":  # for others; nothing here depends on it
            continue
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 2):
            changed = bytearray(whole)
            changed[place] ^= 1
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=path.name):
                opened(prepared)
        path.write_bytes(whole)
    opened(prepared)


def test_each_number_of_the_index_is_guarded(prepared):
    file = prepared / "index.json"
    table = json.loads(file.read_text())
    file.write_text(json.dumps(table | {"end_of_text": table["end_of_text"] + 1}))
    message = "index.json was changed after it was written: remove .* and prepare the text again"
    with pytest.raises(ValueError, match=message):
        read_index(prepared)


def test_truncated_and_missing_files_are_named_even_without_checksums(prepared):
    for path in sorted(prepared.glob("train-*")):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        message = rf"{path.name} has {len(whole) - 1} bytes instead of {len(whole)}: remove"
        with pytest.raises(ValueError, match=message):
            open_shards(prepared, "train", verify=False)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=f"{path.name} is missing: remove"):
            open_shards(prepared, "train", verify=False)
        path.write_bytes(whole)
    (prepared / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing: remove"):
        opened(prepared)


def test_a_changed_token_is_found_by_its_checksum_only(prepared):
    path = prepared / "train-00001.bin"
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)
    open_shards(prepared, "train", verify=False)
    with pytest.raises(
        ValueError, match=r"train-00001\.bin was changed .*checksum differs.*remove"
    ):
        open_shards(prepared, "train")


def test_wrong_lengths_are_found_without_checksums(prepared):
    path = prepared / "train-00000.len"
    lengths = np.fromfile(path, "<u4")
    lengths[0] += 1
    lengths.tofile(path)
    with pytest.raises(ValueError, match=r"train-00000\.len sums to \d+ tokens, not \d+: remove"):
        open_shards(prepared, "train", verify=False)


def test_lengths_that_changed_places_are_found_by_their_checksum(prepared):
    path = prepared / "train-00000.len"
    np.sort(np.fromfile(path, "<u4")).tofile(path)
    open_shards(prepared, "train", verify=False)
    with pytest.raises(ValueError, match=r"train-00000\.len was changed .*checksum differs"):
        open_shards(prepared, "train")


def test_a_folder_that_is_no_folder_of_shards(prepared, source, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no index\.json: it is no whole folder of"):
        open_shards(tmp_path, "train")
    index = (prepared / "index.json").read_text()
    for text, message in [
        ("{no", r"index\.json is not JSON: remove"),
        ("[]", r"index\.json is not an index of token shards \('hakari\.tokens'\)"),
        ('{"format": "other"}', r"is not an index of token shards"),
        (index.replace('"version": 1', '"version": 2'), "has version 2 .*, this is version 1: pre"),
    ]:
        (prepared / "index.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            open_shards(prepared, "train")
    (prepared / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no index"):  # not taken for prepared
        made(source, tmp_path / "tokens")
    shutil.rmtree(prepared)
    assert made(source, tmp_path / "tokens") == prepared


def test_a_split_that_is_not_there(prepared):
    with pytest.raises(ValueError, match=r"no split 'validate': did you mean 'validation'\?"):
        open_shards(prepared, "validate")
    with pytest.raises(ValueError, match="no split 'test': it has train, validation"):
        open_shards(prepared, "test")


def test_a_separator_written_in_the_text_starts_no_document(tmp_path):
    texts = [*TEXTS, f"a{END_OF_TEXT}b", END_OF_TEXT]
    folder = made(rows(tmp_path / "forged.jsonl", texts), tmp_path / "tokens")
    for split in ("train", "validation"):
        tokens = open_shards(folder, split)
        everything = take(tokens, np.arange(tokens.count))
        np.testing.assert_array_equal(
            np.flatnonzero(everything == tokens.end_of_text), tokens.starts[:-1]
        )


def test_one_book_is_split_in_parts(tmp_path):
    book = tmp_path / "book.txt"
    text = "\n\n".join(f"paragraph {i} " + "word " * 40 for i in range(2000))
    book.write_text(text)
    parts = list(documents([str(book)], unit="part"))
    assert "".join(part.text for part in parts) == text
    assert all(PART <= len(part.text) < PART + 300 for part in parts[:-1])
    folder = prepare([str(book)], None, None, 300, 0.3, 0, tmp_path / "tokens", unit="part")
    assert read_index(folder).documents == len(parts)
    lines = list(documents([str(book)], unit="line"))
    assert [line.text for line in lines] == [line for line in text.splitlines() if line]
