"""A manifest is a stranger's file: whatever it claims, it is refused in words, within memory."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import random
import resource
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hakari.training import checkpoint
from hakari.training.checkpoint import manifest
from hakari.training.checkpoint.manifest import from_json
from tests.distributed.faults import in_memory


def program(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW([
        {"params": [*model[0].parameters()], "lr": 0.1},
        {"params": [*model[1].parameters()], "lr": 0.2},
    ])  # fmt: skip
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


EXTRA = {
    "tensor": torch.arange(3), "array": np.ones(2), "tuple": (1, b"x", math.inf),
    "pairs": {1: {"deep": [None, True]}}, "text": "schedule",
}  # fmt: skip


@pytest.fixture(scope="module")
def saved():
    with in_memory() as folder:
        checkpoint.save(folder, *program(0), EXTRA, step=1, rank_state={"seed": torch.ones(2)})
        yield folder / "step-00000001"


@pytest.fixture
def table(saved):
    path = saved / "manifest.json"
    before = {path: path.read_bytes(), saved / "COMMIT": (saved / "COMMIT").read_bytes()}
    yield json.loads(path.read_text())
    for each, data in before.items():
        each.write_bytes(data)


def claim(step: Path, table: Any) -> None:
    """Write a manifest, and a COMMIT that vouches for it."""
    data = (table if isinstance(table, str) else json.dumps(table)).encode()
    try:
        commit = manifest._commit(data, from_json(json.loads(data), "here"))
    except (ValueError, AttributeError, RecursionError):
        commit = {"manifest_sha256": sha256(data).hexdigest()}
    (step / "manifest.json").write_bytes(data)
    (step / "COMMIT").write_text(json.dumps(commit))


@contextlib.contextmanager
def bounded(most: int = 2**28):
    """Memory that is taken beyond what there is now raises MemoryError."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def used(step: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """All that may be done with a checkpoint."""
    source = checkpoint.open_checkpoint(step)
    for key in source.tensors:
        source.array(key)
    checkpoint.load(step, model, optimizer, workers=1)


# --- random ---------------------------------------------------------------------------------

STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 10**6, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, -(2**63),
    0.5, math.nan, math.inf, -0.0, "", "x", "../x", "/etc/passwd", "data", "F32", "F64", "I64",
    "weight", [], {}, [[]], [0], [[0, 1]], [[0, 2], [0, 3]], {"a": 1}, {"$tensor": "x"},
    {"$float": "x"}, {"$tuple": 3}, {"$pairs": [[[], 1]]}, {"$pairs": 3}, {"$bytes": 1},
    {"$bytes": "é"}, [1] * 70, "a" * 5000, {"$array": "extra_state/tensor"},
]  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


def changed(tree: Any, chance: random.Random) -> Any:
    """One random place of a tree is replaced, removed, doubled, renamed or moved."""
    found = copy.deepcopy(tree)
    everywhere = [place for place in places(found) if place]
    *above, last = chance.choice(everywhere)
    holder = found
    for key in above:
        holder = holder[key]
    way = chance.randrange(6)
    if way == 0:
        del holder[last]
    elif way == 1 and isinstance(holder, list):
        holder.insert(last, copy.deepcopy(holder[last]))
    elif way == 2 and isinstance(holder, dict):
        holder[str(chance.choice(STRANGE))] = holder.pop(last)
    elif way == 3:
        holder[last] = copy.deepcopy(at(found, chance.choice(everywhere)))
    elif way == 4 and type(holder[last]) is int:
        holder[last] += chance.choice([-1, 1, 64, 2**24])
    else:
        holder[last] = chance.choice(STRANGE)
    return found


def at(tree: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def fuzz(step: Path, table: Any, seed: int, cases: int) -> int:
    chance, said = random.Random(seed), list[str]()
    expected = {k: v.clone() for k, v in program(0)[0].state_dict().items()}
    model, optimizer = program(1)
    with bounded():
        for _ in range(cases):
            wrong = table
            for _ in range(chance.choice([1, 1, 1, 2, 4])):
                wrong = changed(wrong, chance)
            claim(step, wrong)
            try:
                used(step, model, optimizer)
            except (ValueError, FileNotFoundError) as error:
                said.append(str(error))
            except Exception as error:
                raise AssertionError(f"{error!r} of {json.dumps(wrong)}") from error
            else:
                now = model.state_dict()
                assert all(torch.equal(value, now[name]) for name, value in expected.items())
    assert all(len(text) > 20 for text in said)
    return len(said)


def test_a_changed_manifest_is_refused_in_words(saved, table):
    assert fuzz(saved, table, 0, 300) > 200


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_two_thousand_changed_manifests(saved, table, seed):
    assert fuzz(saved, table, seed, 250) > 150


# --- chosen ---------------------------------------------------------------------------------


def test_unchanged_it_is_loaded(saved, table):
    claim(saved, table)
    model, optimizer = program(1)
    used(saved, model, optimizer)
    for mine, theirs in zip(model.parameters(), program(0)[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def first_file(table: Any) -> str:
    return next(iter(table["files"]))


def weight(table: Any) -> Any:
    return table["tensors"]["0.weight"]["weight"]


def renamed(name: str) -> Any:
    def change(table: Any) -> None:
        (row,) = table["files"].values()
        table["files"] = {name: row}

    return change


WRONG: dict[str, tuple[Any, str]] = {
    "above": (renamed("../secret"), "could leave the folder"),
    "within": (renamed("data/../../secret"), "could leave the folder"),
    "absolute": (renamed("/etc/passwd"), "could leave the folder"),
    "hidden": (renamed("data/.secret"), "could leave the folder"),
    "back": (renamed("data\\..\\x"), "could leave the folder"),
    "a line": (renamed("data/x\n"), "could leave the folder"),
    "a long name": (renamed("a" * 300), "could leave the folder"),
    "a folder": (renamed("data"), "has .* bytes instead of"),
    "below a file": (renamed("COMMIT/x"), "is missing"),
    "shape": (lambda t: weight(t).update(shape=[2**31, 2**31]), r"nothing holds|cannot be"),
    "claim": (lambda t: weight(t).update(shape=[2**61]), "cannot be"),
    "dimensions": (lambda t: weight(t).update(shape=[1] * 65), "cannot be"),
    "negative": (lambda t: weight(t).update(shape=[-2, -3]), "-2 is not a count"),
    "a fraction": (lambda t: weight(t).update(shape=[2.0, 3]), r"2\.0 is not a count"),
    "truth": (lambda t: weight(t).update(shape=[True, 6]), "True is not a count"),
    "not a number": (lambda t: weight(t).update(shape=[math.nan]), "nan is not a count"),
    "type": (lambda t: weight(t).update(dtype="F33"), "dtype 'F33' is none of BOOL"),
    "no content": (lambda t: weight(t).pop("content"), r"malformed \(KeyError"),
    "other content": (
        lambda t: weight(t).update(content="0" * 16),
        "not what was saved, such as 0.w",
    ),
    "gap": (
        lambda t: weight(t).update(fragments=[]),
        r"0\.weight \(weight\) \[2, 3\]: nothing holds",
    ),
    "overlap": (lambda t: weight(t)["fragments"].append(weight(t)["fragments"][0]), "overlap"),
    "no checksum": (lambda t: weight(t)["fragments"][0].__setitem__(3, []), "0 checksums for 24"),
    "offset": (lambda t: weight(t)["fragments"][0].__setitem__(1, 2**50), "do not lie within"),
    "in the header": (lambda t: weight(t)["fragments"][0].__setitem__(1, 8), "do not lie within"),
    "file number": (
        lambda t: weight(t)["fragments"][0].__setitem__(0, 9),
        r"malformed \(IndexError",
    ),
    "header": (
        lambda t: t["files"][first_file(t)].__setitem__(1, 2**60),
        r"a header of [\d,]+ bytes",
    ),
    "size": (lambda t: t["files"][first_file(t)].__setitem__(0, 2**60), "has .* bytes instead of"),
    "format": (lambda t: t.update(format="zip"), "format is 'zip', not 'hakari-checkpoint'"),
    "version": (lambda t: t.update(version=2), "version 2, and this hakari reads 1: update it"),
    "members": (lambda t: t["groups"][0].__setitem__(1, [[1]]), "is not a list of names"),
    "step": (lambda t: t.update(step=-1), "-1 is not a count"),
    "extra": (
        lambda t: t.update(extra={"$tensor": "nowhere"}),
        "malformed state .KeyError: 'nowhere",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_named(saved, table, case):
    change, message = WRONG[case]
    change(table)
    claim(saved, table)
    with bounded(), pytest.raises(ValueError, match=message):
        used(saved, *program(1))


def test_a_state_that_claims_more_than_the_file_has_takes_no_memory(saved, table):
    """Neither for the optimizer nor for an extra state."""
    file = table["files"][first_file(table)]
    file[0] = 2**50
    box = [[0, 2**40]]
    crcs = [1] * 2**18
    row = {"dtype": "F32", "shape": [2**40], "content": "0", "fragments": [[0, file[1], box, crcs]]}
    for name, state in (("0.weight", "momentum"), ("extra_state/x", "extra")):
        wrong = copy.deepcopy(table)
        wrong["tensors"].setdefault(name, {})[state] = row
        claim(saved, wrong)
        with bounded(), pytest.raises(ValueError, match="bytes instead of"):
            checkpoint.load(saved, *program(1))


def test_tensors_that_share_bytes_cannot_claim_more_than_the_files(saved, table):
    wide = weight(table)["fragments"][0]
    for number in range(200):
        row = {**weight(table), "fragments": [wide]}
        table["tensors"][f"copy{number}"] = {"weight": row}
    claim(saved, table)
    with pytest.raises(ValueError, match="cannot lie in files that are smaller"):
        used(saved, *program(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 100_000, "not JSON"),
        ("[]", "list instead of an object"),
        ("3", "int instead of an object"),
        ("", "not JSON"),
        ("\x00", "not JSON"),
        ('{"version": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_what_is_no_manifest_is_refused(saved, table, text, message):
    claim(saved, text)
    with pytest.raises(ValueError, match=message):
        used(saved, *program(1))


def test_a_deep_tree_is_refused_or_read(saved, table):
    tree: Any = 1
    for _ in range(900):
        tree = [tree]
    table["extra"] = tree
    claim(saved, table)
    with bounded(), contextlib.suppress(ValueError):
        used(saved, *program(1))


def test_a_commit_that_vouches_for_another_is_refused(saved, table):
    commit = json.loads((saved / "COMMIT").read_text())
    for name, value in [("save_id", "0"), ("files", 9), ("bytes", 1), ("manifest_bytes", None)]:
        (saved / "COMMIT").write_text(json.dumps(commit | {name: value}))
        with pytest.raises(ValueError, match="COMMIT is not what was written"):
            used(saved, *program(1))
    for text in ("", "[]", "{}", '"x"', "x" * 100):
        (saved / "COMMIT").write_text(text)
        with pytest.raises(ValueError, match="damaged"):
            used(saved, *program(1))
    (saved / "COMMIT").write_text(" " * 2**17)
    with pytest.raises(ValueError, match="over the limit of 65,536"):
        used(saved, *program(1))


@pytest.mark.parametrize("text", ["", "../../etc", "step-1", "/", "step-00000009", "\x00"])
def test_a_latest_that_names_no_checkpoint_is_refused(saved, text):
    path = saved.parent / "LATEST"
    before = path.read_text()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"LATEST names .*to go on from step-00000001, remove"):
        checkpoint.latest(saved.parent)
    path.write_text(before)
