"""torch.save's files: equal to torch's own reading and writing, and no pickle is executed."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from hakari.training.checkpoint.dtypes import BYTES, bits
from hakari.training.checkpoint.foreign import torch_files, torch_writing
from hakari.training.checkpoint.foreign.pickles import unpickle
from hakari.training.checkpoint.foreign.torch_files import read_torch
from hakari.training.checkpoint.foreign.torch_values import Record, Stored, load, plain
from hakari.training.checkpoint.foreign.torch_writing import Lazy, write_torch
from hakari.training.checkpoint.storage import open_folder
from hakari.training.checkpoint.tensors import TORCH, as_bits


def values(dtype: str, count: int = 24) -> torch.Tensor:
    """Every pattern of bits that a type has is as good as any other."""
    raw = np.random.default_rng(3).integers(0, 256, count * BYTES[dtype], dtype=np.uint8)
    raw = raw % 2 if dtype == "BOOL" else raw
    return torch.from_numpy(raw).view(TORCH[dtype])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride()) and (
        np.array_equal(as_bits(one), as_bits(other))
    )


def saved(path: Path, tree: object, **how: object) -> object:
    torch.save(tree, path / "x.pt", **how)
    return read_torch(open_folder(path), "x.pt")


# --- reading what torch writes --------------------------------------------------------------


@pytest.mark.parametrize("dtype", TORCH)
def test_every_type_is_read_as_torch_wrote_it(tmp_path, dtype):
    tensors = {"whole": values(dtype), "scalar": values(dtype)[3], "none": values(dtype)[:0]}
    tensors["grid"] = values(dtype).reshape(2, 3, 4)
    tree = saved(tmp_path, tensors)
    for name, tensor in tensors.items():
        assert (tree[name].dtype, tree[name].file) == (dtype, "x.pt")
        assert same(load(open_folder(tmp_path), tree[name]), tensor)


def test_views_keep_their_strides_and_share_their_storage(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    views = [base, base.t(), base[1:, 2], base[::2, ::3], base[0, 0].expand(3)]
    tree = saved(tmp_path, views)
    folder = open_folder(tmp_path)
    for stored, view in zip(tree, views, strict=True):
        start = tree[0].offset + 4 * view.storage_offset()
        assert (stored.strides, stored.offset) == (view.stride(), start)
        assert torch.equal(load(folder, stored), view)


def test_trees_of_plain_values_are_read_as_torch_loads_them(tmp_path):
    tree = {
        "text": "köder\n",
        "bytes": b"\0\xff",
        "numbers": [0, 255, 256, -1, 2**31, -(2**70), 1.5, float("inf"), True, None],
        5: (1, (2, (3, 4)), ()),
        "ordered": OrderedDict(b=1, a={"c": [[]]}),
        "set": {1, 2},
        "size": torch.Size([3, 4]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "complex": 1 + 2j,
    }
    assert saved(tmp_path, tree) == tree == torch.load(tmp_path / "x.pt")
    for protocol in (3, 4, 5):
        assert saved(tmp_path, tree, pickle_protocol=protocol) == tree


def test_what_python_and_numpy_make_is_read(tmp_path):
    array = np.arange(6, dtype="i2").reshape(2, 3)
    tree = {
        "counts": defaultdict(int, a=1),
        "array": array,
        "fortran": np.asfortranarray(array),
        "scalar": np.float32(1.5),
        "frozen": frozenset([1]),
        "args": argparse.Namespace(lr=0.1),
        "bytearray": bytearray(b"ab"),
    }
    found = saved(tmp_path, tree)
    assert np.array_equal(found["array"], array)
    assert np.array_equal(found["fortran"], array)
    assert (found["scalar"], found["counts"], found["frozen"]) == (1.5, {"a": 1}, {1})
    assert (found["args"].name, found["args"].state) == ("argparse.Namespace", {"lr": 0.1})
    flat = plain(open_folder(tmp_path), found)
    assert flat["args"] == {"class": "argparse.Namespace", "lr": 0.1}
    assert flat["bytearray"] == b"ab"


def test_parameters_modules_and_attributes_are_read_as_their_tensors(tmp_path):
    model = torch.nn.Linear(3, 2)
    model.weight.tensor_model_parallel = True  # as Megatron marks its parameters
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    parts = {"model": model.state_dict(), "p": model.weight, "optimizer": optimizer.state_dict()}
    tree = saved(tmp_path, parts)
    assert list(tree["model"]) == ["weight", "bias"]
    assert tree["p"] == tree["model"]["weight"]  # one storage
    state = tree["optimizer"]["state"][0]
    folder = open_folder(tmp_path)
    assert same(load(folder, state["exp_avg"]), optimizer.state[model.weight]["exp_avg"])
    assert load(folder, state["step"]) == 1.0
    assert tree["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]


def test_a_storage_alone_is_one_dimension_of_bytes(tmp_path):
    tree = saved(tmp_path, {"s": torch.arange(3.0).untyped_storage()})
    assert (tree["s"].dtype, tree["s"].shape) == ("U8", (12,))


def test_a_file_within_a_file_is_read_at_its_place(tmp_path):
    tensor = torch.arange(5.0)
    inner = io.BytesIO()
    torch.save([tensor], inner)
    (tmp_path / "x").write_bytes(b"before" + inner.getvalue() + b"after")
    folder = open_folder(tmp_path)
    (stored,) = read_torch(folder, "x", 6, len(inner.getvalue()))
    assert torch.equal(load(folder, stored), tensor)
    with pytest.raises(ValueError, match=r"ends at byte 1,\d+, not 9,006: truncated"):
        read_torch(folder, "x", 6, 9000)


# --- writing what torch reads ---------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", TORCH)
def test_every_type_is_loaded_by_torch_as_it_was(tmp_path, dtype, mmap):
    tensor = values(dtype)
    lazy = Lazy(dtype, (4, 6), lambda i, out: np.copyto(out, as_bits(tensor)[i : i + out.size]))
    tree = {"whole": tensor, "scalar": tensor[3], "t": tensor.reshape(4, 6).t(), "lazy": lazy}
    write_torch(open_folder(tmp_path), "x.pt", tree, budget=8)
    found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
    assert same(found["lazy"], tensor.reshape(4, 6))
    for name in ("whole", "scalar", "t"):
        assert same(found[name], tree[name])


TREE = {
    "text": "köder\n" * 100,
    "bytes": b"\0\xff",
    "bytearray": bytearray(b"a"),
    "numbers": [0, 255, 65536, -1, 2**31, -(2**31) - 1, 2**70, 1.5, float("-inf"), 1j],
    "flags": (True, False, None),
    5: (1, (2, (3, 4)), ()),
    "ordered": OrderedDict(b=1, a={"c": [[]]}),
    "set": {1, "2"},
    "size": torch.Size([3, 4]),
    "dtype": torch.float8_e5m2,
    "device": torch.device("cpu"),
}


def test_plain_values_go_to_torch_and_come_back(tmp_path):
    write_torch(open_folder(tmp_path), "x.pt", TREE)
    assert torch.load(tmp_path / "x.pt", weights_only=True) == TREE
    assert read_torch(open_folder(tmp_path), "x.pt") == TREE


def test_shared_memory_stays_shared_and_parameters_stay_parameters(tmp_path):
    base = torch.arange(12.0)
    lazy = Lazy("F32", (3,), lambda i, out: out.fill(0))
    parameter = torch.nn.Parameter(base[2:6])
    tree = {"a": base[:4], "b": base[2:], "p": parameter, "x": lazy, "y": lazy}
    write_torch(open_folder(tmp_path), "x.pt", tree)
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert isinstance(found["p"], torch.nn.Parameter)
    assert found["p"].requires_grad
    found["a"][2] = 99
    found["x"][0] = 7
    assert (found["b"][0], found["p"][0], found["y"][0]) == (99, 99, 7)
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert sum(name.startswith("archive/data/") for name in archive.namelist()) == 2


def storages(path: Path) -> list[int]:
    """Where storages start, by the local headers."""
    data, found = path.read_bytes(), []
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            at = info.header_offset
            length = int.from_bytes(data[at + 26 : at + 28], "little")
            length += int.from_bytes(data[at + 28 : at + 30], "little")
            found += [at + 30 + length] if "/data/" in info.filename else []
    return found


@pytest.mark.parametrize("big", [None, 16, 2000])
def test_storages_are_aligned_with_zip64_and_without(tmp_path, monkeypatch, big):
    if big is not None:  # everything of this size is written as what exceeds 4 GiB is
        monkeypatch.setattr(torch_writing, "BIG", big)
    tree = {f"{n}": torch.arange(float(n)) for n in range(40)}
    write_torch(open_folder(tmp_path), "x.pt", tree)
    starts = storages(tmp_path / "x.pt")
    assert len(starts) == 40
    assert all(start % 64 == 0 for start in starts)
    for mmap in (False, True):
        found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
        assert all(same(found[name], tree[name]) for name in tree)
    folder = open_folder(tmp_path)
    again = read_torch(folder, "x.pt")
    assert all(same(load(folder, again[name]), tree[name]) for name in tree)


def test_a_lazy_tensor_is_made_in_chunks_within_the_budget(tmp_path):
    asked, told = [], []

    def fill(start: int, out: np.ndarray) -> None:
        asked.append((start, out.size))
        out[...] = np.arange(start, start + out.size, dtype=np.float32).view(np.uint32)

    tree = Lazy("F32", (100, 100), fill)
    write_torch(open_folder(tmp_path), "x.pt", tree, budget=4096, progress=told.append)
    assert torch.equal(torch.load(tmp_path / "x.pt").reshape(-1), torch.arange(10_000.0))
    assert max(size for _, size in asked) * 4 <= 4096
    assert sum(told) == 40_000


def test_records_are_written_as_the_objects_that_they_are(tmp_path):
    tree = Record("argparse.Namespace", (), {"lr": 0.1})
    write_torch(open_folder(tmp_path), "x.pt", {"args": tree})
    found = torch.load(tmp_path / "x.pt", weights_only=False)
    assert found == {"args": argparse.Namespace(lr=0.1)}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [object()]}, r"x.pt/a/0 is a builtins.object: torch's safe loader refuses it"),
        ({"a": Record("os.system", ("true",))}, r"x.pt/a is a record of 'os.system', which is not"),
        (
            torch.ones(2, device="meta"),
            r"x.pt is a Tensor of torch.float32, torch.strided, on meta",
        ),
        (torch.ones(2).to_sparse(), r"x.pt is a Tensor of torch.float32, torch.sparse_coo"),
        (torch.ones(2, dtype=torch.complex128), r"torch.complex128"),
        (2**4000, r"a number of 4,001 bits"),
    ],
)
def test_what_the_safe_loader_would_refuse_is_not_written(tmp_path, tree, message):
    with pytest.raises(ValueError, match=message):
        write_torch(open_folder(tmp_path), "x.pt", tree)
    assert not list(tmp_path.iterdir())


def test_one_memory_under_two_types_is_not_written(tmp_path):
    base = torch.zeros(4)
    with pytest.raises(ValueError, match="b views the memory of a F32 tensor as I32: clone it"):
        write_torch(open_folder(tmp_path), "x.pt", {"a": base, "b": base.view(torch.int32)})


def test_a_tree_that_holds_itself_is_not_written(tmp_path):
    tree: list[object] = []
    tree.append(tree)
    with pytest.raises(ValueError, match="lies deeper than 400 levels"):
        write_torch(open_folder(tmp_path), "x.pt", tree)


def test_an_old_file_is_not_written_over(tmp_path):
    write_torch(open_folder(tmp_path), "x.pt", 1)
    with pytest.raises(FileExistsError):
        write_torch(open_folder(tmp_path), "x.pt", 2)


# --- pickles that would do something --------------------------------------------------------


class Evil:
    """Pickles as a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> object:
        return self.call


def calls(mark: str) -> dict[str, bytes]:
    """Pickles that each would make the file `mark` if they were executed."""
    code = f"open({mark!r}, 'w').close()"
    objects = {
        "os.system": Evil(os.system, f"touch {mark}"),
        "eval": Evil(eval, code),
        "exec": Evil(exec, code),
        "open": Evil(open, mark, "w"),
        "subprocess": Evil(subprocess.call, ["touch", mark]),
        "Popen": Evil(subprocess.Popen, ["touch", mark]),
        "torch.load": Evil(torch.load, mark),
        "torch.save": Evil(torch.save, 1, mark),
        "getattr": Evil(getattr, Evil(__import__, "os"), "system"),
        "partial": Evil(__import__("functools").partial, os.system, f"touch {mark}"),
        "nested": [{"deep": (Evil(os.system, f"touch {mark}"),)}],
        "loads": Evil(pickle.loads, pickle.dumps(Evil(os.system, f"touch {mark}"))),
        "numpy": Evil(np.save, mark, 1),
    }
    found = {name: pickle.dumps(each, 2) for name, each in objects.items()}
    found |= {f"{name}, protocol 4": pickle.dumps(each, 4) for name, each in objects.items()}
    text = f"touch {mark}".encode()
    found["dotted"] = b"\x80\x04\x8c\x08argparse\x8c\x0d_os.system\x93\x8c" + bytes([len(text)])
    found["dotted"] += text + b"\x85R."
    found["inst"] = b"(S'touch " + mark.encode() + b"'\nios\nsystem\n."
    found["obj"] = b"(cos\nsystem\nX" + len(text).to_bytes(4, "little") + text + b"o."
    found["extension"] = b"\x80\x02\x82\x01."
    found["setattr of a global"] = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b."
    found["call of a record"] = b"\x80\x02cargparse\nNamespace\n)R)R."
    found["call of a string"] = b"\x80\x02X\x02\x00\x00\x00os)R."
    found["module as inert"] = b"\x80\x02cargparse\n_sys\n."
    return found


NAMES = list(calls("/nowhere"))


@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_is_executed(tmp_path, name):
    mark = tmp_path / "executed"
    data = calls(str(mark))[name]
    before = {*sys.modules, "encodings.cp437"}  # which zipfile may import
    with pytest.raises(ValueError, match=r"x\.pt"):
        unpickle(data, "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/version", "3")
    with pytest.raises(ValueError, match=r"x\.pt: data\.pkl (is refused|cannot be read|has an op)"):
        read_torch(open_folder(tmp_path), "x.pt", inert=("deepspeed.*", "megatron.*"))
    assert not mark.exists()
    assert set(sys.modules) <= before


def test_the_calls_above_are_real(tmp_path):
    """The mutant: a plain unpickler would execute them."""
    mark = tmp_path / "executed"
    pickle.loads(calls(str(mark))["os.system"])
    assert mark.exists()


def test_a_refusal_names_the_class_and_the_file(tmp_path):
    torch.save({"x": Evil(os.system, "true")}, tmp_path / "x.pt")
    message = r"x\.pt: data\.pkl is refused: the pickle names '(posix|nt)\.system'"
    with pytest.raises(ValueError, match=message):
        read_torch(open_folder(tmp_path), "x.pt")


def test_classes_that_are_asked_for_become_records_and_are_not_imported():
    data = b"\x80\x02cmegatron.core.x\nConfig\nK\x07\x85R}X\x01\x00\x00\x00aK\x01sb."
    found = unpickle(data, "x", inert=("megatron.*",))
    assert (found.name, found.args, found.state) == ("megatron.core.x.Config", (7,), {"a": 1})
    assert not any(name.startswith("megatron") for name in sys.modules)
    with pytest.raises(
        ValueError, match=r"x is refused: the pickle names 'megatron\.core\.x\.Conf"
    ):
        unpickle(data, "x", inert=("megatronx.*",))


def laughs(levels: int) -> bytes:
    """Lists of two references to the list before: 2 ** levels values in a few bytes."""
    return b"\x80\x02]" + b"".join(b"q\x00](h\x00h\x00e" for _ in range(levels)) + b"."


BOMBS = {
    "copies": (
        b"\x80\x02c__builtin__\nlist\nq\x00]("
        + b"N" * 10**5
        + b"eq\x01"
        + b"h\x00h\x01\x85R0" * 3000
        + b"N.",
        "copies the same values over and over",
    ),
    "laughs": (laughs(100), "holds a tree of over 100,000,000 values"),
    "cycle": (b"\x80\x02]q\x00h\x00a.", "holds a tree that holds itself"),
    "depth": (b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".", "too deep"),
    "length": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f.", "ends after 12 bytes: truncated"),
    "bytearray": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f.", "ends after 12 bytes: truncated"),
    "range": (
        b"\x80\x02c__builtin__\nlist\nc__builtin__\nrange\nJ\xff\xff\xff\x7f\x85R\x85R.",
        "list",
    ),
    "memo": (b"\x80\x02Nr\xff\xff\xff\xff0h\x00.", "cannot be read"),
    "array": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01J\xff\xff\xff\x7f\x85"
        b"cnumpy\ndtype\nU\x02f8\x85R\x89C\x00tb.",
        "a NumPy array of shape",
    ),
    "objects": (b"\x80\x02cnumpy\ndtype\nU\x02O8\x85R.", "NumPy's type 'O8'"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_pickles_do_not_become_large(name):
    data, message = BOMBS[name]
    with pytest.raises(ValueError, match=message):
        unpickle(data, "x.pt")


# --- damage ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[bytes, object]:
    path = tmp_path_factory.mktemp("good")
    torch.save({"a": torch.arange(10.0), "b": [torch.ones(3, 2).t(), "x", 5]}, path / "x.pt")
    return (path / "x.pt").read_bytes(), read_torch(open_folder(path), "x.pt")


def outcome(path: Path, data: bytes) -> tuple[object, str]:
    """The tree that is read, or what the error says."""
    (path / "x.pt").write_bytes(data)
    try:
        return read_torch(open_folder(path), "x.pt"), ""
    except ValueError as error:
        return None, str(error)


def test_truncations_are_errors(tmp_path, good):
    data, _ = good
    for length in [*range(0, 60), *range(60, len(data), 17), len(data) - 1]:
        tree, error = outcome(tmp_path, data[:length])
        assert (tree, "x.pt" in error) == (None, True)


def test_flipped_bits_are_errors_or_change_nothing_that_is_read(tmp_path, good):
    data, tree = good
    chance = random.Random(5)
    refused = 0
    for _ in range(300):
        mutant = bytearray(data)
        for _ in range(chance.choice([1, 1, 1, 4])):
            mutant[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        found, error = outcome(tmp_path, bytes(mutant))
        refused += found is None
        assert found == tree or (found is None and "x.pt" in error)
    assert refused > 100


def test_flipped_bits_of_a_pickle_are_errors_or_trees(good):
    """Below the checksum, too: whatever the bytes, the machine ends, or says that it cannot."""
    with zipfile.ZipFile(io.BytesIO(good[0])) as archive:
        data = archive.read("x/data.pkl")
    chance = random.Random(6)
    for _ in range(600):
        mutant = bytearray(data)
        mutant[chance.randrange(len(data))] = chance.randrange(256)
        with contextlib.suppress(ValueError):  # any other type of error fails the test
            unpickle(bytes(mutant), "x.pt", torch_files.TENSORS, (), lambda _: None)


def rezipped(path: Path, how: int = zipfile.ZIP_STORED, **changed: bytes | None) -> None:
    """The file with some entries changed, or left out."""
    with zipfile.ZipFile(path / "x.pt") as old:
        entries = {info.filename: old.read(info) for info in old.infolist()}
    for name, data in changed.items():
        entries["x/" + name.replace("_pkl", ".pkl").replace("__", "/")] = data
    with zipfile.ZipFile(path / "x.pt", "w", how) as new:
        for name, data in entries.items():
            if data is not None:
                new.writestr(name, data)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"how": zipfile.ZIP_DEFLATED}, r"is compressed or encrypted, which torch.save never does"),
        ({"byteorder": b"big"}, r"is not of a little-endian machine"),
        ({"data__0": b"12"}, r"storage 0 has 2 bytes, not 10 of F32"),
        ({"data__0": None}, r"x\.pt: data\.pkl cannot be read \('data/0'\)"),
        ({"data_pkl": None}, r"has 0 data\.pkl"),
        ({"constants_pkl": b""}, r"is TorchScript, a program: torch.save its state_dict"),
    ],
)
def test_other_zips_are_refused(tmp_path, changed, message):
    torch.save(torch.arange(10.0), tmp_path / "x.pt")
    rezipped(tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        read_torch(open_folder(tmp_path), "x.pt")


def test_a_pickle_over_the_limit_is_refused(tmp_path, monkeypatch):
    torch.save(list(range(1000)), tmp_path / "x.pt")
    monkeypatch.setattr(torch_files, "MOST_PICKLE", 1000)
    with pytest.raises(ValueError, match=r"data\.pkl has \d,\d+ bytes, over the limit of 1,000"):
        read_torch(open_folder(tmp_path), "x.pt")


def test_the_format_from_before_zip_is_refused_with_the_way_out(tmp_path):
    torch.save([1], tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before torch 1\.6: .* torch\.save it again"):
        read_torch(open_folder(tmp_path), "x.pt")
    (tmp_path / "y.pt").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"y\.pt is not a zip file"):
        read_torch(open_folder(tmp_path), "y.pt")


def test_a_tensor_larger_than_its_storage_is_refused():
    storage = Stored("F32", (4,), (1,), "x", 0)
    for given in ((0, (5,), (1,)), (1, (4,), (1,)), (0, (2, 2), (3, 1)), (-1, (1,), (1,))):
        with pytest.raises(ValueError, match=r"a tensor of shape"):
            torch_files.TENSORS["torch._utils._rebuild_tensor_v2"](storage, *given)


def test_a_large_tensor_among_values_is_not_loaded(tmp_path):
    stored = saved(tmp_path, torch.zeros(100))
    with pytest.raises(ValueError, match=r"a tensor of 400 bytes lies among plain values"):
        load(open_folder(tmp_path), stored, most=399)
    assert bits("F32").itemsize == 4
