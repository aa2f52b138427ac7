"""Hugging Face folders, against transformers and the safetensors library."""

import json
import random
import struct

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hakari.training.checkpoint.foreign.hugging_face_folder import (
    metadata,
    open_hugging_face,
    write_hugging_face,
)
from hakari.training.checkpoint.source import WEIGHT, Info, Source
from hakari.training.checkpoint.storage import open_folder
from hakari.training.checkpoint.tensors import TORCH, as_tensor, name_of

INDEX = "model.safetensors.index.json"


def llama(folder, tied=False, **options):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, **options)
    return model


def source_of(tensors, **more):
    """Tensors in memory as a source, by a route that shares nothing with the folder's."""

    def read(key, box, out):
        part = tensors[key[0]][tuple(slice(*edge) for edge in box)].contiguous()
        raw = part.reshape(-1).view(torch.uint8).numpy().tobytes()
        out[...] = np.frombuffer(raw, out.dtype).reshape(out.shape)

    infos = {(n, WEIGHT): Info(tuple(t.shape), name_of(t.dtype)) for n, t in tensors.items()}
    return Source(infos, read, **more)


def tensor(source, name):
    return as_tensor(source.array((name, WEIGHT)), source.tensors[name, WEIGHT].dtype)


def same(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


# --- with transformers --------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_a_model_goes_through_us_and_comes_back_byte_for_byte(tmp_path, tied, shard):
    model = llama(tmp_path / "theirs", tied, max_shard_size=shard)
    assert (tmp_path / "theirs" / INDEX).exists() == (shard == "8KB")
    source = open_hugging_face(tmp_path / "theirs")
    write_hugging_face(
        source,
        tmp_path / "ours",
        config=tmp_path / "theirs",
        shard_bytes=5 * 10**9 if shard == "5GB" else 8000,
        workers=3,
    )
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, value in again.state_dict().items():
        assert same(value, expected[name]), name
    assert source.tied == ((("model.embed_tokens.weight", "lm_head.weight"),) if tied else ())


def test_the_index_is_as_theirs(tmp_path):
    llama(tmp_path / "theirs", max_shard_size="8KB")
    write_hugging_face(open_hugging_face(tmp_path / "theirs"), tmp_path / "ours", shard_bytes=8000)
    theirs, ours = (json.loads((tmp_path / f / INDEX).read_text()) for f in ("theirs", "ours"))
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    held = {
        name: file
        for file in set(ours["weight_map"].values())
        for name in load_file(tmp_path / "ours" / file)
    }
    assert held == ours["weight_map"]
    for file in set(held.values()):
        with safe_open(tmp_path / "ours" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            small = sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
        assert small <= 8000


def test_cast_weights_are_torchs(tmp_path):
    model = llama(tmp_path / "theirs")
    write_hugging_face(
        open_hugging_face(tmp_path / "theirs"),
        tmp_path / "ours",
        config=tmp_path / "theirs",
        dtype="BF16",
    )
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    for name, value in model.state_dict().items():
        assert same(again.state_dict()[name], value.to(torch.bfloat16)), name
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"


def test_configuration_is_taken_over_untouched_without_a_cast(tmp_path):
    llama(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    source = open_hugging_face(tmp_path / "theirs")
    write_hugging_face(source, tmp_path / "ours", config=tmp_path / "theirs")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert not (tmp_path / "ours" / "notes.txt").exists()


# --- without ------------------------------------------------------------------------------


def test_every_element_type_is_read_by_box_and_written(tmp_path):
    torch.manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, (5, 6 * dtype.itemsize), dtype=torch.uint8).view(dtype)
        for name, dtype in TORCH.items()
    }
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4), "row": torch.randn(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_hugging_face(tmp_path)
    for name, value in tensors.items():
        assert same(tensor(source, name), value), name
        if value.dim() == 2 and value.numel():
            part = source.array((name, WEIGHT), ((1, 4), (2, 5)))
            assert same(as_tensor(part, name), value[1:4, 2:5]), name
    write_hugging_face(source, tmp_path / "ours", budget=2**18)
    again = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(same(again[name], value) for name, value in tensors.items())


def test_only_weights_go_and_only_floats_are_cast(tmp_path):
    tensors = {"w": torch.randn(300, 7), "ids": torch.arange(9), "h": torch.randn(4).half()}
    source = source_of(tensors)
    read = source.read
    seen = []

    def watched(key, box, out):
        seen.append((key, out.nbytes))
        read(key, box, out)

    both = source.tensors | {("w", "exp_avg"): Info((300, 7), "F32")}
    told = []
    write_hugging_face(
        Source(both, watched), tmp_path, dtype="F64", budget=2**18, workers=1, progress=told.append
    )
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert same(again["w"], tensors["w"].double())
    assert same(again["h"], tensors["h"].double())
    assert same(again["ids"], tensors["ids"])
    assert sum(told) == sum(value.nbytes for value in tensors.values())
    assert {key[1] for key, _ in seen} == {WEIGHT}


def test_no_chunk_is_larger_than_the_budget_allows(tmp_path):
    sizes = []
    tensors = {"w": torch.randn(3000, 500)}
    plain = source_of(tensors)

    def read(key, box, out):
        sizes.append(out.nbytes)
        plain.read(key, box, out)

    write_hugging_face(Source(plain.tensors, read), tmp_path, budget=2**21, workers=2)
    assert max(sizes) <= 2**21 // 8
    assert same(load_file(tmp_path / "model.safetensors")["w"], tensors["w"])


def test_of_tied_weights_one_is_written_under_the_name_that_transformers_keeps(tmp_path):
    value = torch.randn(5, 3)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    for number, kept in enumerate([names, names[:1], names[1:]]):
        source = source_of(dict.fromkeys(kept, value), tied=(names,))
        write_hugging_face(source, tmp_path / str(number))
        again = load_file(tmp_path / str(number) / "model.safetensors")
        assert list(again) == ["model.embed_tokens.weight"]
        assert same(again["model.embed_tokens.weight"], value)


def test_what_cannot_be_written_is_refused(tmp_path):
    value = torch.randn(5, 3)
    apart = source_of({"a": value, "b": value + 1}, tied=(("a", "b"),))
    with pytest.raises(ValueError, match="a and b are tied, and differ: one of them would be lost"):
        write_hugging_face(apart, tmp_path / "x")
    with pytest.raises(ValueError, match=r"cannot be written as 'F8': use one of F64, F32, BF16"):
        write_hugging_face(source_of({"a": value}), tmp_path / "x", dtype="F8")
    with pytest.raises(ValueError, match="the source has no weights"):
        write_hugging_face(source_of({}), tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: give a model's folder"):
        write_hugging_face(source_of({"a": value}), tmp_path / "x", config=tmp_path)
    with pytest.raises(ValueError, match="shards of 0 bytes: give at least 1"):
        write_hugging_face(source_of({"a": value}), tmp_path / "x", shard_bytes=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(FileExistsError, match="full is not empty"):
        write_hugging_face(source_of({"a": value}), tmp_path / "full")


def test_an_interruption_leaves_no_index(tmp_path):
    def stop(count):
        raise KeyboardInterrupt

    source = source_of({"a": torch.randn(9), "b": torch.randn(9)})
    with pytest.raises(KeyboardInterrupt):
        write_hugging_face(source, tmp_path, shard_bytes=40, progress=stop)
    with pytest.raises(FileNotFoundError, match=f"has neither model.safetensors nor {INDEX}"):
        open_hugging_face(tmp_path)


# --- hostile folders ----------------------------------------------------------------------


def write_raw(folder, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + text + data)


def row(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [*offsets]}


HOSTILE = {
    "longer than the file": (b"{}", b"", 2**40, "claims 1,099,511,627,776 bytes; the file has 10"),
    "not JSON": (b"{nope", b"", None, "is not JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "is not JSON"),
    "deep": (b"[" * 100_000, b"", None, "is not JSON"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", b"", None, "is not JSON"),
    "a list": ([1], b"", None, "is a list instead of an object"),
    "twice": (b'{"a": 1, "a": 2}', b"", None, "'a' is there twice"),
    "not a tensor": ({"a": 5}, b"", None, "a: 5 is not a dtype, a shape and data_offsets"),
    "fewer fields": ({"a": {"dtype": "F32"}}, bytes(8), None, "is not a dtype, a shape"),
    "dtype": ({"a": row("F4")}, bytes(8), None, "dtype 'F4' is none of BOOL"),
    "dtype of another kind": ({"a": row(["F4"])}, bytes(8), None, "is none of BOOL"),
    "negative": ({"a": row(shape=(-2,))}, bytes(8), None, r"shape \[-2\] cannot be"),
    "fraction": ({"a": row(shape=(2.0,))}, bytes(8), None, r"shape \[2.0\] cannot be"),
    "bool": ({"a": row(shape=(True, 2))}, bytes(8), None, "cannot be"),
    "too many": ({"a": row(shape=[1] * 65, offsets=(0, 4))}, bytes(4), None, "cannot be"),
    "too large": ({"a": row(shape=(2**40, 2**40, 0), offsets=(0, 0))}, b"", None, "cannot be"),
    "wrong size": ({"a": row(shape=(3,))}, bytes(8), None, "has 12 bytes, and its data_offsets"),
    "offsets": ({"a": row(offsets=(0, 8, 9))}, bytes(8), None, "are not a start and an end"),
    "backwards": ({"a": row(offsets=(8, 0))}, bytes(8), None, "has 8 bytes, and its"),
    "overlap": ({"a": row(), "b": row(offsets=(4, 12))}, bytes(12), None, "they overlap"),
    "same place": ({"a": row(), "b": row()}, bytes(8), None, "they overlap"),
    "gap": ({"a": row(), "b": row(offsets=(12, 20))}, bytes(20), None, "they leave a gap"),
    "beyond": ({"a": row()}, bytes(7), None, "its tensors end at byte"),
    "left over": ({"a": row()}, bytes(9), None, "its tensors end at byte"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_is_refused_by_name(tmp_path, kind):
    header, data, length, told = HOSTILE[kind]
    write_raw(tmp_path, header, data, length)
    with pytest.raises(ValueError, match=f"model.safetensors.*{told}"):
        open_hugging_face(tmp_path)
    if kind == "too many":  # more dimensions than NumPy has
        return
    with pytest.raises(SafetensorError):  # theirs refuses the same
        load_file(tmp_path / "model.safetensors")


def test_metadata_are_strings(tmp_path):
    folder = open_folder(tmp_path)
    write_raw(tmp_path, {"__metadata__": {"a": "1"}})
    assert metadata(folder, "model.safetensors") == {"a": "1"}
    write_raw(tmp_path, {"__metadata__": {"a": 1}})
    with pytest.raises(ValueError, match="__metadata__ is not an object of strings"):
        metadata(folder, "model.safetensors")


def test_a_file_that_is_too_short(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x01")
    with pytest.raises(ValueError, match="has 1 bytes: too few for a safetensors file"):
        open_hugging_face(tmp_path)


def test_what_passes_is_read_as_the_safetensors_library_reads_it(tmp_path):
    """Bytes of headers changed at random: never another exception, never other values."""
    rng = random.Random(5)
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4)}, file)
    good = bytearray(file.read_bytes())
    length = 8 + struct.unpack("<Q", good[:8])[0]
    passed = 0
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 4])):
            data[rng.randrange(length)] = rng.choice([rng.randrange(256), *b'0123456789"[]{},:'])
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        file.write_bytes(data)
        try:
            source = open_hugging_face(tmp_path)
        except ValueError:
            continue
        theirs = load_file(file)
        assert {name for name, _ in source.tensors} == theirs.keys()
        assert all(same(tensor(source, name), value) for name, value in theirs.items())
        passed += 1
    assert passed > 20


def shards(folder):
    llama(folder, max_shard_size="8KB")
    table = json.loads((folder / INDEX).read_text())
    return sorted(set(table["weight_map"].values()))


def test_a_shard_that_is_missing_or_of_another_model_is_named(tmp_path):
    files = shards(tmp_path)
    (tmp_path / files[1]).rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=rf"{files[1]} is missing; .*index\.json names it"):
        open_hugging_face(tmp_path)
    save_file({"other": torch.zeros(2)}, tmp_path / files[1])
    with pytest.raises(ValueError, match=rf"{files[1]} lacks model\..*: it is not of this index"):
        open_hugging_face(tmp_path)
    more = load_file(tmp_path / "away") | {"other": torch.zeros(2)}
    save_file(more, tmp_path / files[1])
    with pytest.raises(ValueError, match=f"{files[1]} has, unknown to the index, other"):
        open_hugging_face(tmp_path)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ("{}", "has no weight_map"),
        ("[]", "is a list instead of an object"),
        ("{", "is not JSON"),
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "could leave the folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "could leave the folder"),
    ],
)
def test_a_hostile_index_is_refused(tmp_path, index, told):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(ValueError, match=told):
        open_hugging_face(tmp_path)


def test_two_answers_are_none(tmp_path):
    llama(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="remove the one that is left from before"):
        open_hugging_face(tmp_path)
