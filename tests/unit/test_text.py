"""Text is found, read whole, in a fixed order; what cannot be read is said, with its place."""

from __future__ import annotations

import gzip
import json
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hakari.training import text
from hakari.training.text import Document, documents, files


@pytest.fixture
def folder(tmp_path):
    """b.txt, a.md, deep/c.rst, and what a folder leaves out: hidden files and a picture."""
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a.md", "first")
    write(tmp_path / "deep" / "c.rst", "third, in depth")
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / ".git" / "config.txt", "no")
    (tmp_path / "deep" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    return tmp_path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8", newline="")
    return path


def texts(*sources, column=None):
    return [document.text for document in documents([str(source) for source in sources], column)]


def fails(message, *sources, column=None, error=ValueError):
    with pytest.raises(error, match=message):
        texts(*sources, column=column)


# --- sources ------------------------------------------------------------------------------


def test_a_file_is_one_document_kept_byte_for_byte(tmp_path):
    content = "línea\r\n\ttab\r  spaces \n\n\n\x00\u2028 end"
    path = write(tmp_path / "odd.txt", content)
    assert list(documents([str(path)])) == [Document(str(path), content)]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert texts(path) == ["hello"]


def test_a_folder_gives_its_text_files_sorted_and_neither_hidden_nor_binary_ones(folder):
    assert texts(folder) == ["first", "second", "third, in depth"]


def test_a_glob_goes_as_deep_as_it_says_and_leaves_hidden_files_out(folder):
    assert texts(folder / "*.txt") == ["second"]
    assert texts(folder / "**" / "*.r*") == ["third, in depth"]
    assert texts(folder / "**" / "*.[tm]*") == ["first", "second"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    assert texts(write(tmp_path / "draft [1].txt", "draft")) == ["draft"]


def test_sources_keep_their_order_and_no_file_comes_twice(folder):
    sources = [folder / "deep", folder / "b.txt", folder, folder / "deep" / ".." / "b.txt"]
    assert texts(*sources) == ["third, in depth", "second", "first"]


def test_a_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert texts("~/b.txt", "~/deep/*.rst") == ["second", "third, in depth"]


def test_pythons_library_is_there_without_its_tests_and_without_installed_packages():
    found = files(["stdlib:**/*.py"])
    parts = {part for path in found for part in path.parts}
    assert len(found) > 400
    assert {"asyncio", "json"} <= parts
    assert not {"site-packages", "test", "tests", "idle_test", "__pycache__"} & parts
    assert sum(path.stat().st_size for path in found) > 8e6
    assert texts("stdlib:this.py")[0].startswith("s = ")


def test_empty_files_are_no_documents(folder):
    write(folder / "empty.txt", "")
    assert "" not in texts(folder)


# --- tables -------------------------------------------------------------------------------

ROWS = [{"text": "one", "id": 1}, {"text": "two\nlines", "id": 2}, {"text": "", "id": 3}]


@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson", "t.json", "t.jsonl.gz", "t.json.gz"])
def test_lines_of_json_are_documents_named_by_their_line(tmp_path, name):
    raw = "\n".join(json.dumps(row) for row in ROWS).replace("\n", "\n\n", 1).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else b"\xef\xbb\xbf" + raw)
    found = list(documents([str(path)], "text"))
    assert found == [Document(f"{path}:1", "one"), Document(f"{path}:3", "two\nlines")]


def test_a_parquet_file_is_read_by_row_group(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=1)
    assert texts(path, column="text") == ["one", "two\nlines"]
    assert [d.name for d in documents([str(tmp_path)], "text")] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_text_may_be_large_or_of_categories(tmp_path, kind):
    column = pa.array(["a", "b", "a"]).cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "t.parquet")
    assert texts(tmp_path / "t.parquet", column="text") == ["a", "b", "a"]


def test_packed_text_is_one_document(tmp_path):
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress("schön".encode()))
    assert texts(tmp_path / "t.txt.gz") == texts(tmp_path) == ["schön"]


def test_memory_holds_a_document_not_the_corpus(tmp_path):
    line = json.dumps({"text": "x" * 100_000}) + "\n"
    path = write(tmp_path / "t.jsonl", line * 200)
    tracemalloc.start()
    assert sum(len(document.text) for document in documents([str(path)], "text")) == 20_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


# --- what is refused ----------------------------------------------------------------------


def test_a_wrong_name_is_answered_with_the_nearest(folder):
    fails(
        rf"no file or folder .*bb\.txt: did you mean {re.escape(str(folder / 'b.txt'))}\?",
        folder / "bb.txt",
        error=FileNotFoundError,
    )
    fails(
        r"no file or folder .*deeep: did you mean .*deep\?",
        folder / "deeep" / "c.rst",
        error=FileNotFoundError,
    )
    fails("zzz; .* holds no similar name", folder / "zzz", error=FileNotFoundError)
    fails(
        "no file or folder .*b.txt/x; .*b.txt holds no",
        folder / "b.txt" / "x",
        error=FileNotFoundError,
    )


def test_a_wrong_name_beside_us_is_answered_too(folder, monkeypatch):
    monkeypatch.chdir(folder)
    fails(r"no file or folder a\.mdd: did you mean a\.md\?", "a.mdd", error=FileNotFoundError)


def test_a_glob_without_matches_says_what_the_folder_holds(folder):
    fails(
        r"no file matches .*\*\.tex: .* holds \.git, \.hidden\.txt, a\.md, b\.txt, deep$",
        folder / "*.tex",
        error=FileNotFoundError,
    )
    fails(
        r"no folder .*depe: did you mean .*deep\?",
        folder / "depe" / "*.rst",
        error=FileNotFoundError,
    )
    fails(
        r"no file matches stdlib:\*\.txtt in Python's library at .*stdlib:\*\*/\*\.py is",
        "stdlib:*.txtt",
        error=FileNotFoundError,
    )


def test_folders_without_text(tmp_path):
    fails("no text files in .*: .* is empty", tmp_path, error=FileNotFoundError)
    for number in range(7):
        (tmp_path / f"{number}.bin").write_bytes(b"\0")
    fails(
        r"no text files in .* holds 0\.bin, .*, 4\.bin, \.\.\.", tmp_path, error=FileNotFoundError
    )


def test_no_sources():
    fails("no sources of text: name a file, a folder or a glob")


def test_a_corpus_without_any_text(tmp_path):
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", "")
    fails(f"no text in the 2 files of {re.escape(str(tmp_path))}: all empty", tmp_path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_other_encodings_are_named_with_the_byte(tmp_path, mark):
    path = tmp_path / "latin.txt"
    path.write_bytes(mark + "déjà".encode("latin1"))
    place = rf"latin\.txt is not UTF-8: byte 0xe9 at offset {len(mark) + 1}; leave it out, or "
    fails(place + "convert it: iconv -f LATIN1 -t UTF-8", path)
    path.write_bytes("déjà".encode("utf-16"))
    fails("is not UTF-8: byte 0xff at offset 0; .* iconv -f UTF-16", tmp_path)


def test_other_encodings_in_a_later_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"text": "\xc3\xa9"}\n{"text": "\xe9"}\n')
    fails("byte 0xe9 at offset 25", path, column="text")


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(b"some text" * 1000)
    for name, raw in [("short", whole[:-9]), ("no", b"plain"), ("bad", whole[:12] + b"\xff" * 30)]:
        path = tmp_path / f"{name}.txt.gz"
        path.write_bytes(raw)
        fails(rf"{name}\.txt\.gz is not a whole gzip file \(.*\): pack it again", path)
        fails("is not a whole gzip file", tmp_path)
        path.unlink()


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_a_missing_column_is_answered_with_those_there_are(tmp_path, name):
    path = tmp_path / name
    if name == "t.jsonl":
        write(path, json.dumps({"content": "a", "title": "b"}))
    else:
        pq.write_table(pa.table({"content": ["a"], "title": ["b"]}), path)
    fails(
        r"has no column 'contents': did you mean 'content'\? it has content, title",
        path,
        column="contents",
    )
    fails("has no column 'xyz': it has content, title", path, column="xyz")
    fails(r"is a table: name the column that holds the text \(it has content, title\)", path)


def test_a_row_without_columns(tmp_path):
    fails("has no column 'text': it has none", write(tmp_path / "t.jsonl", "{}"), column="text")


def test_values_that_are_no_text(tmp_path):
    path = write(tmp_path / "t.jsonl", '{"text": "a"}\n{"text": 3}\n')
    fails(r"t\.jsonl:2: column 'text' is a int \(3\); it should be text", path, column="text")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "t.parquet")
    fails(r"t\.parquet:2: column 'text' is null", tmp_path / "t.parquet", column="text")
    path = write(tmp_path / "s.jsonl", '{"text": "ab\\ud800"}')
    fails(r"s\.jsonl:1: .* half of a surrogate pair, \\ud800, at character 2", path, column="text")


def test_lines_that_are_no_objects(tmp_path):
    path = write(tmp_path / "package.json", '{\n  "name": "x"\n}\n')
    fails(
        r"package\.json, line 1 is not JSON \(.*\): .* one JSON object a line; .* \.txt",
        path,
        column="text",
    )
    path = write(tmp_path / "t.json", "[1, 2]")
    fails(r"t\.json, line 1 holds a list: ", path, column="text")


def test_a_file_that_only_says_it_is_parquet(tmp_path):
    fails(r"t\.parquet is not a Parquet file \(", write(tmp_path / "t.parquet", "no"), column="t")


def test_a_truncated_row_is_met_when_it_is_reached_not_before(tmp_path):
    path = write(tmp_path / "t.jsonl", '{"text": "a"}\n{"text": "b')
    found = documents([str(path)], "text")
    assert next(found).text == "a"
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        next(found)


def test_text_is_told_from_binary_as_file_does(tmp_path):
    (tmp_path / "colours.log").write_bytes(b"\x1b[31mred\x1b[0m\x07\x0c\n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin1"))
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.7 stream \x01\x02")
    kept = [path.name for path in files([str(tmp_path)])]
    assert kept == ["colours.log", "latin.txt"]
    assert Path(text.__file__) in files([str(Path(text.__file__).parent)])
