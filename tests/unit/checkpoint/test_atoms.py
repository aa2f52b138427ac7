"""Atoms: what is exported is read again, in both layouts, and nothing else is taken for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hakari.training.checkpoint import export_atoms
from hakari.training.checkpoint.boxes import whole, within
from hakari.training.checkpoint.foreign.atoms import open_atoms
from hakari.training.checkpoint.formats import detect, open_any
from hakari.training.checkpoint.source import Info, Source
from hakari.training.checkpoint.storage import LocalFolder

LAYOUTS = ["grouped", "one-file-per-parameter"]
both = pytest.mark.parametrize("layout", LAYOUTS)
VALUES = {
    ("a.weight", "weight"): np.arange(12, dtype=np.uint32).reshape(3, 4),
    ("a.weight", "exp_avg"): np.arange(12, 24, dtype=np.uint32).reshape(3, 4),
    ("a.weight", "step"): np.array(7, np.uint32),
    ("b/c", "weight"): np.arange(2, dtype=np.uint16),
    ("b/c", "factors/0"): np.arange(5, dtype=np.uint32),
    ("none", "weight"): np.zeros((0, 3), np.uint32),
}


def source(values: Any = VALUES) -> Source:
    def read(key: Any, box: Any, out: np.ndarray) -> None:
        out[...] = values[key][within(box, whole(values[key].shape))] if box else values[key]

    kinds = {2: "BF16", 4: "F32"}
    return Source({k: Info(v.shape, kinds[v.itemsize]) for k, v in values.items()}, read)


def test_both_layouts_are_read_again(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        export_atoms(source(), tmp_path / layout, layout=layout)
        assert detect(tmp_path / layout) == "atoms"
        found = open_any(tmp_path / layout)
        assert found.tensors == source().tensors
        assert (found.step, found.optimizer, found.groups, found.extra) == (None, "", (), None)
        for key, value in VALUES.items():
            assert np.array_equal(found.array(key), value), key
        part = found.array(("a.weight", "exp_avg"), ((1, 3), (2, 4)))
        assert part.tolist() == [[18, 19], [22, 23]]


def test_a_state_is_what_stands_before_the_first_slash_where_nothing_says_more(
    tmp_path: Path,
) -> None:
    """As in older exports, which say neither their states nor how many files."""
    plain = {"exp_avg/a/b": torch.ones(2), "weight/a/b": torch.zeros(2)}
    save_file(plain, tmp_path / "atoms-00000.safetensors")
    assert {*open_atoms(tmp_path).tensors} == {("a/b", "exp_avg"), ("a/b", "weight")}


@both
def test_a_file_that_is_missing_is_noticed(tmp_path: Path, monkeypatch: Any, layout: Any) -> None:
    monkeypatch.setattr("hakari.training.checkpoint.conversion.FILE", 50)
    export_atoms(source(), tmp_path, layout=layout)
    files = sorted(tmp_path.rglob("*.safetensors"))
    for file in (files[0], files[-1]):
        data = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError, match=rf"has {len(files) - 1} of {len(files)} files: the e"):
            open_atoms(tmp_path)
        file.write_bytes(data)
    assert open_atoms(tmp_path).tensors == source().tensors
    assert len(files) > 2
    files[0].write_bytes(files[0].read_bytes()[:-1])
    with pytest.raises(ValueError, match="bytes, and its tensors end at byte"):
        open_atoms(tmp_path)


@both
def test_what_a_header_says_of_itself_is_checked(tmp_path: Path, layout: Any) -> None:
    name = "atoms-00000.safetensors" if layout == "grouped" else "a/weight.safetensors"
    (tmp_path / "a").mkdir()
    for said in ("[", "[]", '{"files": "x", "states": []}', '{"files": 1}', "[" * 100_000):
        save_file({"weight/a": torch.ones(1)}, tmp_path / name, {"atoms": said})
        with pytest.raises(ValueError, match=f"{name}: metadata atoms is "):
            open_atoms(tmp_path)


def test_names_that_no_export_gives_are_refused(tmp_path: Path) -> None:
    for number, title in enumerate(("w", "/w", "w/")):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file({title: torch.ones(1)}, folder / "atoms-00000.safetensors")
        with pytest.raises(ValueError, match=rf"holds '{title}', which is not STATE/NAME: it is"):
            open_atoms(folder)
    (tmp_path / "0" / "atoms-00000.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither atoms-00000\.safetensors nor NAME/STATE"):
        open_atoms(tmp_path / "0")
    (tmp_path / "0" / "w").mkdir()
    save_file({"weight/v": torch.ones(1)}, tmp_path / "0" / "w" / "weight.safetensors")
    with pytest.raises(ValueError, match=r"holds 'weight/v', which is not w/weight, the other way"):
        open_atoms(tmp_path / "0")


def test_a_tensor_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    for number in (0, 1):
        save_file({"weight/a": torch.ones(1)}, tmp_path / f"atoms-0000{number}.safetensors")
    with pytest.raises(ValueError, match=r"has a \(weight\) twice, also in atoms-00001\.safetens"):
        open_atoms(tmp_path)


# --- telling the format -------------------------------------------------------------------


def test_no_other_folder_of_folders_is_taken_for_an_export(tmp_path: Path) -> None:
    """Nor one in which the names agree, and the tensors do not."""
    models = {
        "a model in each": ("llama/model.safetensors", {"model.norm.weight": torch.ones(1)}),
        "shards of ours": ("data/r00000-000.safetensors", {"weight/a": torch.ones(1)}),
        "two in one": (
            "a/step.safetensors",
            {"step/a": torch.ones(1), "weight/a": torch.ones(1)},
        ),
        "another state": ("a/weight.safetensors", {"step/a": torch.ones(1)}),
    }
    for number, (file, tensors) in enumerate(models.values()):
        path = tmp_path / str(number) / file
        path.parent.mkdir(parents=True)
        save_file(tensors, path)
        with pytest.raises(ValueError, match="is no checkpoint that is known"):
            detect(tmp_path / str(number))
    broken = tmp_path / "broken" / "a" / "weight.safetensors"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="is no checkpoint that is known"):
        detect(tmp_path / "broken")


def test_other_formats_keep_their_names_beside_atoms(tmp_path: Path) -> None:
    export_atoms(source(), tmp_path / "atoms")
    file = tmp_path / "atoms" / "atoms-00000.safetensors"
    save_file({"a": torch.ones(1)}, tmp_path / "atoms" / "model.safetensors")
    assert detect(tmp_path / "atoms") == "hugging-face"
    (tmp_path / "atoms" / "model.safetensors").unlink()
    assert detect(tmp_path / "atoms") == "atoms"
    with safe_open(file, "pt") as opened:
        said = json.loads(opened.metadata()["atoms"])
    assert said == {"files": 1, "states": ["exp_avg", "factors/0", "step", "weight"]}


def test_telling_the_format_looks_into_one_file(tmp_path: Path, monkeypatch: Any) -> None:
    """However many parameters and other folders there are."""
    values = {(f"p{i:03d}.w", "weight"): np.arange(2, dtype=np.uint32) for i in range(50)}
    export_atoms(source(values), tmp_path / "many", layout="one-file-per-parameter")
    looked: list[str] = []
    real = LocalFolder.entries

    def entries(folder: LocalFolder) -> list[str]:
        looked.append(folder.where)
        return real(folder)

    monkeypatch.setattr(LocalFolder, "entries", entries)
    assert detect(tmp_path / "many") == "atoms"
    inside = {path for path in looked if path != str(tmp_path / "many")}
    assert inside == {str(tmp_path / "many" / "p000.w")}
    shutil.rmtree(tmp_path / "many")
