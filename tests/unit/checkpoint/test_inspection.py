"""What a checkpoint holds, in what two differ, and which may go."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hakari.training.checkpoint import Group, Piece, convert, open_checkpoint, save
from hakari.training.checkpoint.inspection import (
    Changed,
    diff,
    inspect,
    inspect_root,
)
from hakari.training.checkpoint.retention import prune, removable
from hakari.training.checkpoint.source import Info


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(4)


def make(folder, step=7, lr=0.1, change=None, extra=None, rank=None, dtype=torch.float32):
    torch.manual_seed(1)
    model = Tied().to(dtype)
    groups = [
        {"params": [model.embed.weight], "lr": lr},
        {"params": [*model.norm.parameters()], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    model.norm(model.embed(torch.arange(3)))[0].sum().backward()
    optimizer.step()
    if change:
        with torch.no_grad():
            change(model, optimizer)
    save(folder, model, optimizer, extra, step=step, rank_state=rank)
    return folder / f"step-{step:08d}"


def plain(folder, **tensors):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


# --- inspect ------------------------------------------------------------------------------


def test_what_a_checkpoint_says_of_itself(tmp_path):
    made = make(tmp_path, extra={"cursor": 5, "rng": torch.arange(3)}, rank={"seed": 1})
    found = inspect(made)
    assert (found.form, found.step, found.optimizer, found.files) == ("hakari", 7, "AdamW", 1)
    assert found.where == str(made)
    assert found.bytes == sum(file.stat().st_size for file in (made / "data").iterdir())
    assert found.tied == (("embed.weight", "head.weight"),)
    assert found.tensors == 12
    rows = {p.name: p for p in found.parameters}
    assert rows.keys() == {"embed.weight", "norm.weight", "norm.bias"}
    embed = rows["embed.weight"]
    assert (embed.shape, embed.dtype, embed.bytes) == ((7, 4), "F32", 3 * 7 * 4 * 4 + 4)
    assert embed.states == {
        "step": Info((), "F32"),
        "exp_avg": Info((7, 4), "F32"),
        "exp_avg_sq": Info((7, 4), "F32"),
    }
    assert [group.members for group in found.groups] == [
        ("embed.weight",),
        ("norm.weight", "norm.bias"),
    ]
    assert [group.options["lr"] for group in found.groups] == [0.1, 0.001]
    assert found.extra == ("cursor", "rng")
    assert found.ranks == (("seed",),)
    assert found.origin["torch"] == torch.__version__
    assert found.made.startswith("20")
    assert found.made.endswith("+00:00")


def test_a_checkpoint_with_lost_files_can_be_looked_into(tmp_path):
    made = make(tmp_path, extra={"rng": torch.arange(3)})
    whole = inspect(made)
    for file in (made / "data").iterdir():
        file.unlink()
    assert inspect(made) == whole
    assert [each.whole for each in inspect_root(tmp_path).steps] == [False]


def test_another_format(tmp_path):
    found = inspect(plain(tmp_path, a=torch.zeros(2, 3), b=torch.zeros(4).half()))
    assert (found.form, found.step, found.bytes, found.files) == ("hugging-face", None, 32, None)
    assert [(p.name, p.shape, p.dtype) for p in found.parameters] == [
        ("a", (2, 3), "F32"),
        ("b", (4,), "F16"),
    ]
    assert found.groups == ()


def test_a_folder_of_checkpoints(tmp_path):
    for step in (3, 7, 12):
        make(tmp_path, step)
    (tmp_path / ".tmp-step-00000020-ab").mkdir()
    (tmp_path / "step-00000030").mkdir()
    root = inspect_root(tmp_path)
    assert [each.step for each in root.steps] == [3, 7, 12]
    assert [each.bytes for each in root.steps] == [
        inspect(tmp_path / f"step-{step:08d}").bytes for step in (3, 7, 12)
    ]
    assert all(each.whole for each in root.steps)
    assert root.latest == f"{tmp_path}/step-00000012"
    assert root.leftovers == (".tmp-step-00000020-ab", "step-00000030")
    assert root.problem == ""
    assert inspect(tmp_path).step == 12


def test_a_latest_that_is_gone_is_a_problem_and_no_failure(tmp_path):
    make(tmp_path, 3)
    (tmp_path / "LATEST").write_text("step-00000009\n")
    root = inspect_root(tmp_path)
    assert root.latest is None
    assert "names 'step-00000009', which is not a complete checkpoint" in root.problem
    assert [each.step for each in root.steps] == [3]


# --- diff ---------------------------------------------------------------------------------


def test_a_checkpoint_is_the_same_as_itself_however_it_is_stored(tmp_path):
    first = make(tmp_path / "a", extra={"rng": torch.arange(3)}, rank={"seed": 1})
    convert(open_checkpoint(first), tmp_path / "b")
    found = diff(first, tmp_path / "b")
    assert found.same
    assert (found.only_first, found.only_second, found.kinds, found.values) == ((), (), (), ())
    assert found.equal == 12
    assert diff(first, first).same
    assert diff(make(tmp_path / "c"), make(tmp_path / "d")).same


def test_equal_contents_are_not_read(tmp_path):
    def change(model, optimizer):
        model.norm.bias[2] += 1

    told = []
    first, second = make(tmp_path / "a"), make(tmp_path / "b", change=change)
    found = diff(first, second, progress=told.append)
    assert [(v.parameter, v.state) for v in found.values] == [("norm.bias", "weight")]
    assert sum(told) == 2 * 4 * 4
    assert found.equal == 11


def test_how_much_values_differ(tmp_path):
    torch.manual_seed(4)
    a = torch.randn(300, 70)
    b = a.clone()
    b[5, 3:9] += 0.25
    b[7] *= 1.5
    whole = {"w": a, "same": torch.ones(3)}
    one, two = plain(tmp_path / "a", **whole), plain(tmp_path / "b", **(whole | {"w": b}))
    (found,) = diff(one, two).values
    gap = (a.double() - b.double()).abs()
    assert (found.parameter, found.state) == ("w", "weight")
    assert found.elements == int((a != b).sum())
    assert found.largest == gap.max().item()
    assert found.relative == pytest.approx((gap.norm() / a.double().norm()).item(), rel=1e-14)
    assert not diff(one, two).same


def test_values_are_compared_in_chunks(tmp_path, monkeypatch):
    torch.manual_seed(4)
    a, b = torch.randn(50, 70), torch.randn(50, 70)
    one, two = plain(tmp_path / "a", w=a), plain(tmp_path / "b", w=b)
    (whole,) = diff(one, two).values
    monkeypatch.setattr("hakari.training.checkpoint.inspection.CHUNK", 300)
    told = []
    (parts,) = diff(one, two, progress=told.append).values
    assert max(told) <= 600
    assert sum(told) == 2 * a.nbytes
    assert (parts.elements, parts.largest) == (whole.elements, whole.largest)
    assert parts.relative == pytest.approx(whole.relative, rel=1e-13)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, math.nan], [1.0, math.nan], None),
        ([math.inf, 1.0], [math.inf, 1.0], None),
        ([0.0, 1.0], [-0.0, 1.0], (1, 0.0, 0.0)),
        ([0.0, 0.0], [0.0, 2.0], (1, 2.0, math.inf)),
        ([1.0, 1.0], [math.inf, 1.0], (1, math.inf, math.inf)),
        ([1.0, 5.0], [math.nan, 6.0], (2, math.nan, math.nan)),
    ],
)
def test_numbers_that_are_none_are_told(tmp_path, a, b, expected):
    one = plain(tmp_path / "a", w=torch.tensor(a))
    found = diff(one, plain(tmp_path / "b", w=torch.tensor(b)))
    if expected is None:
        assert found.same
    else:
        assert repr(found.values) == repr((Changed("w", "weight", *expected),))


def test_not_a_number_in_an_early_chunk_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("hakari.training.checkpoint.inspection.CHUNK", 4)
    a, b = torch.zeros(4), torch.tensor([0.0, math.nan, 3.0, 1.0])
    (found,) = diff(plain(tmp_path / "a", w=a), plain(tmp_path / "b", w=b)).values
    assert math.isnan(found.largest)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "complex64", "float8_e4m3fn"])
def test_any_element_type_is_compared(tmp_path, dtype):
    a = torch.tensor([0, 1, 1, 0]).to(getattr(torch, dtype))
    b = torch.tensor([0, 1, 0, 1]).to(getattr(torch, dtype))
    (found,) = diff(plain(tmp_path / "a", w=a), plain(tmp_path / "b", w=b)).values
    assert (found.elements, found.largest, found.relative) == (2, 1.0, 1.0)


def test_presence_shape_and_type(tmp_path):
    one = plain(tmp_path / "a", a=torch.ones(2), b=torch.ones(2), c=torch.ones(2), d=torch.ones(2))
    more = {"b": torch.ones(3), "c": torch.ones(2).half(), "d": torch.tensor([1.0, 2.0]).bfloat16()}
    found = diff(one, plain(tmp_path / "b", e=torch.ones(2), **more))
    assert found.only_first == (("a", "weight"),)
    assert found.only_second == (("e", "weight"),)
    assert found.kinds == (
        (("b", "weight"), Info((2,), "F32"), Info((3,), "F32")),
        (("c", "weight"), Info((2,), "F32"), Info((2,), "F16")),
        (("d", "weight"), Info((2,), "F32"), Info((2,), "BF16")),
    )
    assert found.values == (Changed("d", "weight", 1, 1.0, 1 / math.sqrt(2)),)
    assert found.equal == 0


def test_not_a_number_is_equal_to_itself_between_types(tmp_path):
    value = torch.tensor([1.0, math.nan])
    found = diff(plain(tmp_path / "a", w=value), plain(tmp_path / "b", w=value.bfloat16()))
    assert len(found.kinds) == 1
    assert found.values == ()


def test_tied_tensors_meet_under_either_name(tmp_path):
    first = make(tmp_path / "a")
    weight = open_checkpoint(first).array(("embed.weight", "weight"))
    value = torch.from_numpy(weight.view("i4")).view(torch.float32)
    second = plain(tmp_path / "b", **{"head.weight": value})
    found = diff(first, second)
    assert found.equal == 1
    assert found.only_second == ()
    assert ("embed.weight", "weight") not in found.only_first
    assert diff(second, first).only_first == ()


def test_what_is_no_tensor(tmp_path):
    extra = {"cursor": 5, "deep": {"list": [1, 2]}, "rng": torch.arange(3), "same": "x"}
    other = {"cursor": 6, "deep": {"list": [1, 3, 4]}, "rng": torch.arange(3) + 1, "same": "x"}
    first = make(tmp_path / "a", 7, extra=extra, rank={"seed": 1})
    second = make(tmp_path / "b", 8, lr=0.1, extra=other, rank={"seed": 2})
    found = diff(first, second)
    rest = {what: (a, b) for what, a, b in found.rest}
    assert rest.pop("extra_state/rng")[0].startswith("I64 [3] ")
    assert rest == {
        "step": ("7", "8"),
        "extra_state/cursor": ("5", "6"),
        "extra_state/deep/list/1": ("2", "3"),
        "extra_state/deep/list/2": ("nothing", "4"),
    }
    assert found.ranks == (("rank_states/0/seed", "1", "2"),)


def test_what_ranks_keep_of_their_own_is_shown_and_is_no_difference(tmp_path):
    """Saved by 2 and by 4 processes, a state is the same."""
    first, second = make(tmp_path / "a", rank={"seed": 1}), make(tmp_path / "b")
    found = diff(first, second)
    assert found.same
    assert found.ranks == (("rank_states/0/seed", "1", "nothing"),)
    assert not diff(first, make(tmp_path / "c", rank={"seed": 1}, extra={"more": 1})).same


def test_options_are_compared_by_parameter_not_by_group(tmp_path):
    first = make(tmp_path / "a")
    source = open_checkpoint(first)
    apart = [
        Group(group.options | ({"lr": 0.5} if name == "norm.bias" else {}), (name,))
        for group in source.groups
        for name in group.members
    ]
    convert(replace(source, groups=tuple(apart)), tmp_path / "b")
    assert diff(first, tmp_path / "b").rest == (("lr of norm.bias", "0.001", "0.5"),)
    convert(replace(source, groups=()), tmp_path / "c")
    assert diff(first, tmp_path / "c").rest == (("groups of options", "2", "0"),)


# --- prune --------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", [(), (9,), (9, 7), (9, 7, 5, 3)])
@pytest.mark.parametrize("keep", [1, 2, 9])
def test_what_may_go_is_what_training_would_remove(tmp_path, damaged, keep):
    for step in (3, 5, 7, 9):
        made = make(tmp_path, step)
        if step in damaged:
            (file,) = (made / "data").iterdir()
            file.write_bytes(file.read_bytes()[:-1])
    old = removable(tmp_path, keep)
    whole = [step for step in (9, 7, 5, 3) if step not in damaged]
    last = whole[:keep][-1] if len(whole) >= keep else 0
    assert old == [f"step-{step:08d}" for step in (9, 7, 5, 3) if step < last]
    assert prune(tmp_path, keep) == old


def test_prune_refuses(tmp_path):
    made = make(tmp_path)
    with pytest.raises(ValueError, match="keep 0: at least 1 checkpoint has to be kept"):
        removable(tmp_path, 0)
    with pytest.raises(ValueError, match="is one checkpoint: give the folder that it lies in"):
        removable(made, 1)


def test_a_cut_tensor_is_compared_whole(tmp_path):
    value = torch.arange(12.0).reshape(3, 4)
    boxes = [((0, 1), (0, 4)), ((1, 3), (0, 4))]
    pieces = [Piece(("w", "weight"), (3, 4), box, value[box[0][0] : box[0][1]]) for box in boxes]
    save(tmp_path / "a", None, step=1, pieces=pieces)
    found = diff(tmp_path / "a", plain(tmp_path / "b", w=value))
    assert found.equal == 1
    assert [row[0] for row in found.rest] == ["step"]
