"""Rules: closed forms by hand, random programs there and back, and every refusal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hakari.training import hugging_face
from hakari.training.checkpoint.boxes import whole, within
from hakari.training.checkpoint.language import rows
from hakari.training.checkpoint.language.assembly import apply, invert
from hakari.training.checkpoint.language.model_config import numbers_of
from hakari.training.checkpoint.language.rules import (
    Block,
    Program,
    Rule,
    check,
    evaluate,
    load_rules,
    need_numbers,
    shipped,
    shipped_names,
)
from hakari.training.checkpoint.source import Group, Info, Source
from hakari.training.config import Model, MoE
from hakari.training.hugging_face_config import places
from hakari.training.model import Transformer

ONE = (0, 0, 0)


def held(tensors: Mapping[Any, Any], log: list[Any] | None = None, **more: Any) -> Source:
    """A source in memory; plain names are weights."""
    arrays = {
        key if isinstance(key, tuple) else (key, "weight"): np.asarray(a, dtype=np.uint32)
        for key, a in tensors.items()
    }

    def read(key: Any, box: Any, out: np.ndarray) -> None:
        if log is not None:
            log.append((key, box))
        out[...] = arrays[key][within(box, whole(arrays[key].shape))]

    return Source({k: Info(a.shape, "F32") for k, a in arrays.items()}, read, **more)


def everything(source: Source) -> dict[Any, list[Any]]:
    return {key: source.array(key).tolist() for key in source.tensors}


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32).view(np.uint32)


def on_tp(*tensors: Mapping[Any, Any]) -> dict[Any, Source]:
    return {(t, 0, 0): held(own) for t, own in enumerate(tensors)}


def weights(program: Program, slices: Mapping[Any, Source]) -> dict[str, Any]:
    return {name: value for (name, _), value in everything(apply(program, slices)).items()}


# --- closed forms -------------------------------------------------------------------------


def test_unique_renames() -> None:
    program = Program((Rule(r"h\.(\d+)\.w", "layers.{1 + 2}.w"),))
    assert weights(program, {ONE: held({"h.3.w": [1, 2]})}) == {"layers.5.w": [1, 2]}
    back = invert(program, held({"layers.5.w": [1, 2]}))
    assert everything(back[ONE]) == {("h.3.w", "weight"): [1, 2]}


def test_shard_along_either_dimension() -> None:
    program = Program((Rule("a", "a", "shard"), Rule("b", "b", "shard", dim=1)))
    slices = on_tp({"a": [1, 2], "b": [[1], [3]]}, {"a": [3, 4], "b": [[2], [4]]})
    assert weights(program, slices) == {"a": [1, 2, 3, 4], "b": [[1, 2], [3, 4]]}


def test_replicated_and_first() -> None:
    slices = on_tp({"a": [1, 2]}, {"a": [1, 2]})
    assert weights(Program((Rule("a", "a", "replicated"),)), slices) == {"a": [1, 2]}
    slices = on_tp({"a": [1, 2]}, {"a": [1, 9]})
    first = Program((Rule("a", "a", "replicated", check="first"),))
    assert weights(first, slices) == {"a": [1, 2]}


def test_average_of_floats() -> None:
    program = Program((Rule("a", "a", "average", max_rel_diff=0.5),))
    slices = on_tp({"a": floats(1, 2, 3)}, {"a": floats(1, 3, 3)})
    assert weights(program, slices) == {"a": floats(1, 2.5, 3).tolist()}


def test_average_of_bfloat16() -> None:
    def half(value: float) -> Source:
        bits = torch.tensor([value], dtype=torch.bfloat16).view(torch.int16).numpy()
        own = bits.view(np.uint16)
        return Source(
            {("a", "weight"): Info((1,), "BF16")}, lambda k, b, out: out.__setitem__(..., own)
        )

    program = Program((Rule("a", "a", "average", max_rel_diff=0.5),))
    found = apply(program, {(0, 0, 0): half(1.0), (1, 0, 0): half(2.0)}).array(("a", "weight"))
    assert found.dtype == np.uint16
    assert torch.from_numpy(found.view(np.int16)).view(torch.bfloat16).tolist() == [1.5]


def test_only_floats_are_averaged() -> None:
    def count(value: int) -> Source:
        return Source(
            {("a", "weight"): Info((1,), "I32")}, lambda k, b, out: out.__setitem__(..., value)
        )

    atoms = apply(Program((Rule("a", "a", "average"),)), {ONE: count(1), (1, 0, 0): count(2)})
    with pytest.raises(ValueError, match="weight of a on tp 0 pp 0 ep 0 is I32: only floats"):
        atoms.array(("a", "weight"))


def test_average_keeps_the_bits_of_equal_copies() -> None:
    odd = np.array([0x7FC00001, 1, 0x80000000], np.uint32)  # a NaN, a subnormal, minus zero
    program = Program((Rule("a", "a", "average"),))
    assert weights(program, on_tp({"a": odd}, {"a": odd}, {"a": odd})) == {"a": odd.tolist()}


def test_fused_blocks_into_one_atom_and_into_several() -> None:
    slices = on_tp({"qkv": [1, 2, 5, 7]}, {"qkv": [3, 4, 6, 8]})
    sizes = (Block("2 * d"), Block("d"), Block("d"))
    fused = Program((Rule("qkv", "qkv", "shard", blocks=sizes),), {"d": 2})
    assert weights(fused, slices) == {"qkv": [1, 2, 3, 4, 5, 6, 7, 8]}
    apart = tuple(Block(b.size, name) for b, name in zip(sizes, "qkv", strict=True))
    split = Program((Rule("qkv", kind="shard", blocks=apart),), {"d": 2})
    assert weights(split, slices) == {"q": [1, 2, 3, 4], "k": [5, 6], "v": [7, 8]}


def test_groups_of_queries_with_their_key_and_value() -> None:
    blocks = (Block(8, "q"), Block(4, "k"), Block(4, "v"))
    program = Program((Rule("qkv", kind="shard", blocks=blocks, groups="kv_heads"),))
    program = Program(program.rules, {"kv_heads": 2})  # 2 query heads of 2 rows in each group
    slices = on_tp({"qkv": [1, 2, 3, 4, 11, 12, 21, 22]}, {"qkv": [5, 6, 7, 8, 13, 14, 23, 24]})
    assert weights(program, slices) == {
        "q": [1, 2, 3, 4, 5, 6, 7, 8],
        "k": [11, 12, 13, 14],
        "v": [21, 22, 23, 24],
    }


def test_fewer_key_heads_than_ranks() -> None:
    rule = Rule("k", "k", "shard", size=4, unit=2, split="heads", copies=True)
    slices = on_tp({"k": [1, 2]}, {"k": [1, 2]}, {"k": [3, 4]}, {"k": [3, 4]})
    assert weights(Program((rule,)), slices) == {"k": [1, 2, 3, 4]}
    back = invert(Program((rule,)), held({"k": [1, 2, 3, 4]}), tp=4)
    assert [everything(s) for s in back.values()] == [everything(s) for s in slices.values()]


@pytest.mark.parametrize("order", ["pairs", "halves"])
def test_rotary_order_is_the_reshape_that_converters_use(order: str) -> None:
    heads, width = 3, 4
    held_so = torch.arange(heads * width)
    if order == "pairs":
        expected = held_so.view(heads, width // 2, 2).transpose(1, 2).reshape(-1)
    else:
        expected = held_so.view(heads, 2, width // 2).transpose(1, 2).reshape(-1)
    program = Program((Rule("a", "a", unit="width", order=order),), {"width": width})
    assert weights(program, {ONE: held({"a": held_so.numpy()})}) == {"a": expected.tolist()}


def test_any_permutation() -> None:
    program = Program((Rule("a", "a", order=(2, 0, 1)),))
    assert weights(program, {ONE: held({"a": [7, 8, 9]})}) == {"a": [8, 9, 7]}


def test_padding_is_stripped_and_comes_back_as_zeros() -> None:
    program = Program((Rule("a", "a", "shard", size="vocab", pad="2 * tp_size"),), {"vocab": 5})
    slices = on_tp({"a": [1, 2, 3, 4]}, {"a": [5, 6, 6, 6]})
    assert weights(program, slices) == {"a": [1, 2, 3, 4, 5]}
    back = invert(program, held({"a": [1, 2, 3, 4, 5]}), tp=2)
    assert everything(back[1, 0, 0]) == {("a", "weight"): [5, 0, 0, 0]}


def test_a_whole_multiple_is_not_padded() -> None:
    program = Program((Rule("a", "a", "shard", size=4, pad="2 * tp_size"),))
    back = invert(program, held({"a": [1, 2, 3, 4]}), tp=2)
    assert everything(back[1, 0, 0]) == {("a", "weight"): [3, 4]}


def test_rows_that_no_slice_holds_are_named() -> None:
    plan = rows.Layout((rows.Cut(6, split=(1, 3, 2)),), 3)
    with pytest.raises(ValueError, match=r"^no slice holds rows 1:4 of 6$"):
        rows.gathered(plan, (0, 2))
    with pytest.raises(ValueError, match=r"^no slice holds rows 4:6 of 6$"):
        rows.gathered(plan, (0, 1))


def test_stacked_layers_become_tensors() -> None:
    program = Program((Rule("layers.w".replace(".", r"\."), "{i}.w", stack=("i",)),))
    assert weights(program, {ONE: held({"layers.w": [[1, 2], [3, 4]]})}) == {
        "0.w": [1, 2],
        "1.w": [3, 4],
    }


def test_experts_of_all_ranks_are_stacked() -> None:
    rule = Rule(r"experts\.(?P<e>\d+)\.w", "experts", at=("e",), local={"e": "ep"})
    program = Program((rule,), counts={"e": 4})
    slices = {
        (0, 0, 0): held({"experts.0.w": [1, 2], "experts.1.w": [3, 4]}),
        (0, 0, 1): held({"experts.0.w": [5, 6], "experts.1.w": [7, 8]}),
    }
    experts = {"experts": [[1, 2], [3, 4], [5, 6], [7, 8]]}
    assert weights(program, slices) == experts
    back = invert(program, held(experts), ep=2)
    assert {w: everything(s) for w, s in back.items()} == {
        w: everything(s) for w, s in slices.items()
    }


def test_layers_are_counted_on_over_stages() -> None:
    rule = Rule(r"layers\.(?P<layer>\d+)\.w", "layers.{layer}.w", local={"layer": "pp"})
    program = Program((rule, Rule("end", "end", on={"pp": ("pp_size - 1",)})))
    program = Program(program.rules, counts={"layer": (2, 1)})
    slices = {
        (0, 0, 0): held({"layers.0.w": [1], "layers.1.w": [2]}),
        (0, 1, 0): held({"layers.0.w": [3], "end": [4]}),
    }
    expected = {"layers.0.w": [1], "layers.1.w": [2], "layers.2.w": [3], "end": [4]}
    assert weights(program, slices) == expected
    moved = invert(program, held(expected), pp=3, counts={"layer": (1, 1, 1)})
    assert {w: [*everything(s)] for w, s in moved.items()} == {
        (0, 0, 0): [("layers.0.w", "weight")],
        (0, 1, 0): [("layers.0.w", "weight")],
        (0, 2, 0): [("layers.0.w", "weight"), ("end", "weight")],
    }


def test_a_tie_is_a_checked_copy() -> None:
    rules = (Rule("e", "e"), Rule("head", "e", tie=True, optional=True))
    assert weights(Program(rules), {ONE: held({"e": [1, 2], "head": [1, 2]})}) == {"e": [1, 2]}
    assert [*invert(Program(rules), held({"e": [1]}))[ONE].tensors] == [
        ("e", "weight"),
        ("head", "weight"),
    ]
    with pytest.raises(ValueError, match=r"copies of weight differ: e on .*head on tp 0"):
        weights(Program(rules), {ONE: held({"e": [1, 2], "head": [1, 3]})})


def test_uneven_widths_and_those_of_torch_chunk() -> None:
    assert rows.shares(10, 4, "balanced") == [(0, 3), (3, 6), (6, 8), (8, 10)]
    for units, ranks in [(10, 4), (3, 4), (8, 4), (9, 4), (1, 1)]:
        ours = [b - a for a, b in rows.shares(units, ranks, "chunk")]
        theirs = [len(part) for part in torch.arange(units).chunk(ranks)]
        assert ours == theirs + [0] * (ranks - len(theirs))  # chunk makes fewer parts, not empty
    program = Program((Rule("a", "a", "shard", split="balanced"),))
    back = invert(program, held({"a": range(10)}), tp=4)
    assert [s.tensors["a", "weight"].shape for s in back.values()] == [(3,), (3,), (2,), (2,)]
    listed = Program((Rule("a", "a", "shard", split=(1, 0, 9)),))
    sizes = [
        s.tensors["a", "weight"].shape for s in invert(listed, held({"a": range(10)}), 3).values()
    ]
    assert sizes == [(1,), (0,), (9,)]


# --- states, groups, scalars --------------------------------------------------------------


def test_states_follow_their_parameter_and_steps_must_agree() -> None:
    def own(rank: int, step: int) -> dict[Any, Any]:
        return {("a", "weight"): [rank], ("a", "exp_avg"): [rank + 5], ("a", "step"): step}

    program = Program((Rule("a", "b", "shard"),))
    atoms = apply(program, on_tp(own(1, 3), own(2, 3)))
    assert everything(atoms) == {
        ("b", "weight"): [1, 2],
        ("b", "exp_avg"): [6, 7],
        ("b", "step"): 3,
    }
    atoms = apply(program, on_tp(own(1, 3), own(2, 4)))
    with pytest.raises(ValueError, match=r"b \(step\) is not one number: a on tp 0 .* a on tp 1"):
        atoms.array(("b", "step"))


def test_groups_scalars_ties_and_what_else_there_is_are_kept() -> None:
    more = {
        "groups": (Group({"lr": 1.0}, ("a",)), Group({"lr": 2.0}, ("n",))),
        "scalars": {("a", "step"): 7},
        "tied": (("a", "n"),),
        "step": 7,
        "extra": {"seed": 1},
    }
    blocks = (Block(1, "x"), Block(1, "y"))
    program = Program((Rule("a", blocks=blocks), Rule("n", "m")))
    source = held({"a": [1, 2], "n": [3]}, **more)
    atoms = apply(program, {ONE: source})
    assert atoms.groups == (Group({"lr": 1.0}, ("x", "y")), Group({"lr": 2.0}, ("m",)))
    assert atoms.scalars == {("x", "step"): 7, ("y", "step"): 7}
    assert (atoms.step, atoms.extra) == (7, {"seed": 1})
    back = invert(program, atoms)[ONE]
    assert (back.groups, back.scalars) == (source.groups, source.scalars)
    renamed = Program((Rule("a", "x"), Rule("n", "m")))
    assert apply(renamed, {ONE: source}).tied == (("x", "m"),)


def test_members_of_different_groups_cannot_be_fused() -> None:
    program = Program((Rule("a", blocks=(Block(1, "x"), Block(1, "y"))),))
    groups = (Group({"lr": 1.0}, ("x",)), Group({"lr": 2.0}, ("y",)))
    with pytest.raises(ValueError, match="a would be in 2 optimizer groups: x, y"):
        invert(program, held({"x": [1], "y": [2]}, groups=groups))


def test_a_scalar_parameter() -> None:
    program = Program((Rule("a", "b", "replicated"),))
    slices = invert(program, held({"b": 5}), tp=2)
    assert everything(slices[1, 0, 0]) == {("a", "weight"): 5}
    assert everything(apply(program, slices)) == {("b", "weight"): 5}


# --- random programs ----------------------------------------------------------------------


@st.composite
def cases(draw: Any) -> tuple[Program, dict[Any, np.ndarray], dict[str, int]]:
    """A program, atoms that it fits, and a topology."""
    tp, pp, ep = (draw(st.integers(1, n)) for n in (4, 3, 2))
    topology = {"tp": tp, "pp": pp, "ep": ep}
    layers = [draw(st.integers(1, 2)) for _ in range(pp)]
    rules, atoms = [], {}
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    for number in range(draw(st.integers(1, 4))):
        base, shapes = draw(rule_of(number, tp))
        stacked = draw(st.booleans()) and not base["match"].startswith("e")
        if stacked:
            names = [f"L{{layer}}.{name}" for name in shapes]
            base |= {"stack": ("layer",), "on": {"pp": (0,)}}
            count = sum(layers)
        else:
            base["match"] = r"l\.(?P<layer>\d+)\." + base["match"]
            names = [f"L{{layer}}.{name}" for name in shapes]
            base["local"] = {"layer": "pp"}
            count = sum(layers)
        renamed = dict(zip(shapes, names, strict=True))
        if "to" in base:
            base["to"] = renamed[base["to"]]
        base["blocks"] = tuple(
            Block(b.size, renamed.get(b.to, ""), b.unit, b.split, b.order)
            for b in base.get("blocks", ())
        )
        rules.append(Rule(**base))
        for layer in range(count):
            for name, shape in shapes.items():
                own = f"L{layer}.{name}"
                for state in ("weight", "exp_avg"):
                    atoms[own, state] = chance.integers(0, 2**32, shape, np.uint32)
                atoms[own, "step"] = np.array(number, np.uint32)
    return Program(tuple(rules), counts={"layer": tuple(layers)}), atoms, topology


@st.composite
def rule_of(draw: Any, number: int, tp: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Fields of a rule and the shapes of its atoms."""
    name, other = f"w{number}", draw(st.integers(1, 3))
    kind = draw(
        st.sampled_from(["plain", "copied", "blocks", "groups", "heads", "padded", "uneven"])
    )
    dim = draw(st.integers(0, 1))

    def shape(n: int) -> tuple[int, ...]:
        return (n, other) if dim == 0 else (other, n)

    base: dict[str, Any] = {"match": name, "kind": "shard", "dim": dim}
    if kind == "plain":
        base["kind"] = draw(st.sampled_from(["unique", "replicated", "average"]))
        return base | {"to": name}, {name: (2, other)}
    if kind == "copied":
        base |= {"copies": True, "to": name}
        return base, {name: shape(2 * tp)}
    if kind == "uneven":
        base |= {"split": draw(st.sampled_from(["balanced", "chunk"])), "to": name}
        base["over"] = draw(st.sampled_from(["tp", "ep"]))
        return base, {name: shape(draw(st.integers(0, 9)))}
    if kind == "padded":
        size = draw(st.integers(1, 9))
        return base | {"size": size, "pad": "3 * tp_size", "to": name}, {name: shape(size)}
    heads = draw(st.sampled_from([tp, 2 * tp] + [h for h in range(1, tp) if tp % h == 0]))
    if kind == "heads":
        base |= {"size": 2 * heads, "unit": 2, "split": "heads", "copies": True}
        return base | {"order": draw(st.sampled_from(["", "pairs"])), "to": name}, {
            name: shape(2 * heads)
        }
    many = tp * draw(st.integers(1, 2))
    sizes = {f"{name}.{part}": many * 2 * draw(st.integers(1, 2)) for part in "qkv"}
    orders = [draw(st.sampled_from(["", "pairs", "halves"])) for _ in sizes]
    blocks = [Block(n, to, 2, order=o) for (to, n), o in zip(sizes.items(), orders, strict=True)]
    if kind == "groups":
        base["groups"] = many
    return base | {"blocks": tuple(blocks)}, {to: shape(n) for to, n in sizes.items()}


@given(cases())
@settings(max_examples=120, deadline=None)
def test_there_and_back_is_the_identity(case: Any) -> None:
    program, atoms, topology = case
    slices = invert(program, held(atoms), **topology)
    back = apply(program, slices)
    assert everything(back) == {key: a.tolist() for key, a in atoms.items()}
    again = invert(program, back, **topology)
    assert {w: everything(s) for w, s in again.items()} == {
        w: everything(s) for w, s in slices.items()
    }


@given(cases(), st.data())
@settings(max_examples=80, deadline=None)
def test_a_box_is_a_slice_of_the_whole(case: Any, data: Any) -> None:
    program, atoms, topology = case
    for source in [apply(program, invert(program, held(atoms), **topology))]:
        for key, info in source.tensors.items():
            box = tuple(
                tuple(sorted(data.draw(st.integers(0, n)) for _ in "ab")) for n in info.shape
            )
            expected = source.array(key)[within(box, whole(info.shape))]
            assert source.array(key, box).tolist() == expected.tolist()


@given(cases(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_a_slice_that_is_lost_is_missed(case: Any, chance: Any) -> None:
    program, atoms, topology = case
    slices = invert(program, held(atoms), **topology)
    where = chance.choice([w for w, s in slices.items() if s.tensors])
    name = chance.choice([name for name, _ in slices[where].tensors])
    left = {k: slices[where].array(k) for k in slices[where].tensors if k[0] != name}
    with pytest.raises(ValueError, match=r"missing on|has nothing for|matches nothing"):
        apply(program, {**slices, where: held(left)})


def test_large_maps_by_another_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "NEAR", 64)  # so that small tensors take all the ways of reading
    monkeypatch.setattr(rows, "STAGING", 256)
    chance = np.random.default_rng(3)
    whole_q = chance.integers(0, 2**32, (48, 5), np.uint32)
    program = Program(
        (Rule("a", "a", "shard", unit=12, order="pairs"),),
    )
    slices = invert(program, held({"a": whole_q}), tp=2)
    by_hand = whole_q.reshape(4, 2, 6, 5).swapaxes(1, 2).reshape(48, 5)
    assert np.array_equal(slices[0, 0, 0].array(("a", "weight")), by_hand[:24])
    assert np.array_equal(slices[1, 0, 0].array(("a", "weight")), by_hand[24:])
    back = apply(program, slices)
    assert np.array_equal(back.array(("a", "weight"), ((7, 41), (1, 4))), whole_q[7:41, 1:4])
    outer = np.zeros((34, 10), np.uint32)  # a destination with strides
    back.read(("a", "weight"), ((7, 41), (0, 5)), outer[:, ::2])
    assert np.array_equal(outer[:, ::2], whole_q[7:41])


def test_a_large_tensor_is_read_in_parts_of_16_mebibytes() -> None:
    shape, sizes = (10240, 1024), []

    def read(_: Any, box: Any, out: np.ndarray) -> None:
        sizes.append(out.nbytes)
        out[...] = np.arange(*box[0], dtype=np.uint32)[:, None]

    source = Source({("a", "weight"): Info(shape, "F32")}, read)
    atoms = apply(Program((Rule("a", "a", unit=2048, order="pairs"),)), {ONE: source})
    found = atoms.array(("a", "weight"))
    expected = torch.arange(10240).view(5, 1024, 2).transpose(1, 2).reshape(-1).numpy()
    assert np.array_equal(found[:, 0], expected)
    assert np.array_equal(found[:, -1], expected)
    assert max(sizes) <= rows.STAGING + 4096
    assert sum(sizes) < 1.1 * found.nbytes


def test_only_what_is_asked_for_is_read() -> None:
    log: list[Any] = []
    slices = {(t, 0, 0): held({"a": np.arange(40).reshape(10, 4)}, log) for t in range(2)}
    atoms = apply(Program((Rule("a", "a", "shard"),)), slices)
    assert not log
    atoms.array(("a", "weight"), ((8, 12), (1, 3)))
    assert log == [(("a", "weight"), ((8, 10), (1, 3))), (("a", "weight"), ((0, 2), (1, 3)))]


# --- refusals -----------------------------------------------------------------------------


def test_names_without_a_rule_with_two_and_rules_without_a_name() -> None:
    rules = (
        Rule(r"layers\.(\d+)\.weight", "{1}.w"),
        Rule(r"(?P<all>a.*)", "x.{all}"),
        Rule("abc", "abc"),
        Rule("idle", "idle"),
        Rule("waived", "waived", optional=True),
    )
    with pytest.raises(ValueError, match="the rules do not fit") as caught:
        check(Program(rules), ["layers.0.weights", "abc", "zzzz"])
    text = str(caught.value)
    assert r"layers.0.weights has no rule (the nearest is 'layers\\.(\\d+)\\.weight')" in text
    assert "abc has 2 rules: '(?P<all>a.*)', 'abc'" in text
    assert "zzzz has no rule;" in text
    assert "rule 'idle' matches nothing: set optional" in text
    assert "waived" not in text


def test_the_whole_name_must_match() -> None:
    with pytest.raises(ValueError, match=r"0\.w\.more has no rule"):
        check(Program((Rule(r"(\d+)\.w", "{1}"),)), ["0.w", "0.w.more"])


REFUSED = {
    "a on tp 1 is a copy": (
        Rule("a", "a", "replicated"),
        on_tp({"a": [1, 2]}, {"a": [1, 3]}),
        r"copies of weight differ: a on tp 0 pp 0 ep 0 and a on tp 1 pp 0 ep 0, in 1 of 2 "
        r"elements, the first at \[1\]",
    ),
    "average beyond the limit": (
        Rule("a", "a", "average", max_rel_diff=0.1),
        on_tp({"a": floats(1, 2)}, {"a": floats(1, 3)}),
        r"a on tp 0 .*, a on tp 1 .* differ by 0\.333 .* max_rel_diff = 0\.1",
    ),
    "missing on a rank": (
        Rule("a", "a", "shard"),
        {**on_tp({"a": [1]}), (1, 0, 0): held({})},
        "rule 'a': a: it is missing on tp 1 pp 0 ep 0",
    ),
    "on too many ranks": (
        Rule("a", "a"),
        on_tp({"a": [1]}, {"a": [1]}),
        "it is on tp 1 pp 0 ep 0 too, where the rule says it is not",
    ),
    "a rank is missing": (
        Rule("a", "a", "shard"),
        {(1, 0, 0): held({"a": [1]})},
        "there are no slices of tp 0 pp 0 ep 0",
    ),
    "even, but is not": (
        Rule("a", "a", "shard"),
        on_tp({"a": [1, 2]}, {"a": [1, 2, 3, 4]}),
        "it has 2 rows along dimension 0 on tp 0 pp 0 ep 0; the rule says 3",
    ),
    "does not divide": (
        Rule("a", "a", "shard"),
        on_tp({"a": [1, 2]}, {"a": [1, 2, 3]}),
        "5 units do not divide over 2 ranks .* use 'balanced' or 'chunk'",
    ),
    "other dimensions differ": (
        Rule("a", "a", "shard"),
        on_tp({"a": [[1, 2]]}, {"a": [[1]]}),
        r"it is \[1, 2\] on tp 0 pp 0 ep 0, but \[1, 1\] on tp 1",
    ),
    "overlap": (
        Rule("a", "a", "shard", size=2, unit=2, split="heads"),
        on_tp({"a": [1, 2]}, {"a": [1, 2]}),
        "2 ranks hold the same rows: set copies = true",
    ),
    "block too long": (
        Rule("a", kind="unique", blocks=(Block(2, "x"), Block(3, "y"))),
        {ONE: held({"a": [1, 2, 3, 4]})},
        "it has 4 rows along dimension 0 on tp 0 pp 0 ep 0; the rule says 5",
    ),
    "no value": (
        Rule("a", "a", size="heads * width"),
        {ONE: held({"a": [1]})},
        r"the rules need heads, width: give --set heads=\.\.\. or --config FOLDER \(in Python: c",
    ),
    "a state of another shape": (
        Rule("a", "a"),
        {ONE: held({"a": [1], ("a", "exp_avg"): [1, 2]})},
        r"a \(exp_avg\) is \[2\], its other states \[1\]",
    ),
    "a state that one rank lacks": (
        Rule("a", "a", "shard"),
        on_tp({"a": [1], ("a", "m"): [1]}, {"a": [1]}),
        r"a \(m\) cannot be made: it is missing for a on tp 1 pp 0 ep 0, but F32",
    ),
    "a gap in the numbers": (
        Rule(r"e(\d)", "e", at=("1",)),
        {ONE: held({"e0": [1], "e2": [1]})},
        r"e has nothing at index \[1\]",
    ),
    "no dimension": (
        Rule("a", "a", "shard", dim=1),
        on_tp({"a": [1]}, {"a": [1]}),
        r"it is \[1\]: it has no dimension 1",
    ),
}


@pytest.mark.parametrize("case", [*REFUSED.values()], ids=[*REFUSED])
def test_what_does_not_fit_is_refused_by_name(case: Any) -> None:
    rule, slices, message = case
    with pytest.raises(ValueError, match=message):
        weights(Program((rule,)), slices)


def test_numbers_are_asked_for_all_at_once_and_only_where_they_are_needed() -> None:
    """Of rules that match something; either way; by the names that config.json knows, first."""
    rules = (
        Rule(
            "a", "x", size="width", pad="multiple * tp_size", on={"pp": ("pp_size - last + given",)}
        ),
        Rule("b", blocks=(Block("kv_heads * width", "k", unit="unit"),), groups="heads"),
        Rule("never", "never", size="unused", optional=True),
    )
    program = Program(rules, {"given": 2}, name="own.toml")
    message = (
        r"^rules own\.toml need heads, kv_heads, width, multiple, last, unit: give --set "
        r"heads=\.\.\. or --config FOLDER \(in Python: config\)$"
    )
    with pytest.raises(ValueError, match=message):
        apply(program, {ONE: held({"a": [1], "b": [1]})})
    with pytest.raises(ValueError, match=message):
        invert(program, held({"x": [1], "k": [1]}))
    alone = Program((Rule("a", "a", size="width"),))
    with pytest.raises(ValueError, match=r"^the rules need width: give --set width=\.\.\. \(in Py"):
        apply(alone, {ONE: held({"a": [1]})})
    with pytest.raises(ValueError, match=r"no value for width: give it in config \(has \['a'\]\)"):
        evaluate("a * width", {"a": 1})


def test_the_documentation_has_every_key_and_what_every_shipped_file_needs() -> None:
    page = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    files, keys = page.split("### Rule files")[1].split("| key | says |")
    assert {*re.findall(r"^\| `(\w+)` \|", keys, re.MULTILINE)} == {f.name for f in fields(Rule)}
    rows = dict(re.findall(r"^\| `([\w-]+)` \| .* \| (.*) \|$", files, re.MULTILINE))
    assert {*rows} == {*shipped_names()}
    rows["megatron-gpt-layers"] = rows["megatron-gpt"]  # the same
    for name, needs in rows.items():
        program = shipped(name)
        try:
            need_numbers(program, program.rules)
            needed = []
        except ValueError as error:
            needed = str(error).split(" need ")[1].split(":")[0].split(", ")
        assert {*re.findall(r"`(\w+)`", needs)} == {*needed}, name


def test_numbers_of_a_models_configuration() -> None:
    plain = {
        "num_attention_heads": 6,
        "hidden_size": 48,
        "vocab_size": 100,
        "tie": True,
        "eps": 0.5,
    }
    expected = {"heads": 6, "kv_heads": 6, "head_dim": 8, "vocab": 100}
    own = {"num_attention_heads": 6, "hidden_size": 48, "vocab_size": 100}
    assert numbers_of(plain) == own | expected
    assert numbers_of(plain | {"num_key_value_heads": 2})["kv_heads"] == 2
    assert numbers_of(plain | {"head_dim": 16})["head_dim"] == 16
    assert numbers_of(plain | {"head_dim": None})["head_dim"] == 8
    assert "head_dim" not in numbers_of(plain | {"hidden_size": 50})
    assert numbers_of({}) == {}


def test_two_rules_for_one_atom_overlap() -> None:
    program = Program((Rule("a", "x"), Rule("b", "x")))
    with pytest.raises(ValueError, match="rule 'b': b: rule 'a' makes x too: the two overlap"):
        apply(program, {ONE: held({"a": [1], "b": [2]})})
    with pytest.raises(ValueError, match="x has 2 rules: 'a', 'b'"):
        invert(program, held({"x": [1]}))


def test_inverting_names_what_is_missing_or_of_another_size() -> None:
    pair = Program(
        (Rule(r"(\d)\.gu", blocks=(Block("rows // 2", "{1}.g"), Block("rows // 2", "{1}.u"))),)
    )
    with pytest.raises(ValueError, match=r"0\.g: it needs \{1\}\.u too"):
        invert(pair, held({"0.g": [1]}))
    with pytest.raises(ValueError, match=r"it has \[1, 3\] rows along dimension 0; .* \[2, 2\]"):
        invert(pair, held({"0.g": [1], "0.u": [1, 2, 3]}))
    stacked = Program((Rule("w", "{i}.w", stack=("i",)),))
    with pytest.raises(ValueError, match=r"it needs \{i\}\.w too for \{'i': '1'\}"):
        invert(stacked, held({"0.w": [1], "2.w": [1]}))
    with pytest.raises(ValueError, match=r"it cannot join"):
        invert(stacked, held({"0.w": [1], "1.w": [1, 2]}))
    with pytest.raises(ValueError, match=r"y has no rule"):
        invert(stacked, held({"0.w": [1], "y": [1]}))


def test_pipelines_need_their_counts_and_places() -> None:
    layered = Program((Rule(r"(?P<i>\d)", "{i}", local={"i": "pp"}),))
    two = {(0, 0, 0): held({"0": [1]}), (0, 1, 0): held({"0": [2]})}
    with pytest.raises(ValueError, match=r"how many i each of 2 ranks has is unknown: give counts"):
        apply(layered, two)
    with pytest.raises(ValueError, match=r"counts say there are 0 of i there"):
        apply(Program(layered.rules, counts={"i": (0, 1)}), two)
    with pytest.raises(ValueError, match=r"has nothing for i 2, which must be there"):
        apply(Program(layered.rules, counts={"i": (1, 2)}), two)
    with pytest.raises(ValueError, match=r"i 2 is on no pp rank: counts are too few"):
        invert(layered, held({"0": [1], "1": [1], "2": [1]}), pp=2, counts={"i": (1, 1)})
    with pytest.raises(ValueError, match=r"on which stage it is is not said: set on"):
        invert(Program((Rule("a", "a"),)), held({"a": [1]}), pp=2)
    with pytest.raises(ValueError, match=r"it is on no pp rank of 2: on = \{'pp': \(5,\)\}"):
        invert(Program((Rule("a", "a", on={"pp": (5,)}),)), held({"a": [1]}), pp=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"match": "a.b", "to": "x"}, r"rule 'a\.b': '\.' at 1: escape it"),
        ({"match": "a|b", "to": "x"}, r"'\|' at 1"),
        ({"match": "((a)b)", "to": "{1}"}, r"group 1 holds a group"),
        ({"match": "(a", "to": "{1}"}, r"a group is not closed"),
        ({"match": "a"}, r"it says not what it is part of: set to"),
        ({"match": r"(\d)", "to": "x"}, r"to = 'x' forgets 1, so it cannot be undone"),
        ({"match": "a", "to": "{2}"}, r"to = '\{2\}' names 2; the groups are \[\]"),
        ({"match": "a", "to": "a", "kind": "shared"}, r"kind = 'shared': known are 'unique'"),
        ({"match": "a", "to": "a", "split": "odd"}, r"split = 'odd'"),
        ({"match": "a", "to": "a", "at": ("e",)}, r"e in at, local or across is not a group"),
        ({"match": "a", "to": "a", "pad": 4}, r"pad needs size"),
        ({"match": "a", "size": 3, "blocks": (Block(1, "b"),)}, r"in each of the blocks"),
    ],
)
def test_rules_that_cannot_be_undone_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(**fields)


def test_groups_that_do_not_come_back_are_refused() -> None:
    program = Program((Rule(r"(.*)-(.*)", "{1}{2}"),))
    with pytest.raises(ValueError, match="ab does not tell what its groups were"):
        apply(program, {ONE: held({"a-b": [1]})})


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("a * (b + 2) // 3", 4), ("-(-7 // a)", 3), ("a - b * 2", -5), (5, 5)],
)
def test_expressions(text: str | int, value: int) -> None:
    assert (
        evaluate(text, {"a": 3, "b": 4} if text != "a * (b + 2) // 3" else {"a": 2, "b": 4})
        == value
    )


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "a.b", "a[0]", "2 ** 9", "1.5", "a if a else 1", "1 //", "1 // 0", "'a'"],
)
def test_nothing_else_is_evaluated(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text.split(" ")[0].split("(")[0])):
        evaluate(text, {"a": 3})


# --- files --------------------------------------------------------------------------------


def test_a_file_of_rules(tmp_path: Any) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        "[config]\nheads = 2\nwidth = 1\n[counts]\nlayer = [1, 2]\n[[rule]]\nmatch = 'a'\n"
        "kind = 'shard'\nblocks = [{ to = 'q', size = 'heads * width' }, { to = 'k', size = 2 }]\n"
    )
    program = load_rules(file, {"width": 2})
    blocks = (Block("heads * width", "q"), Block(2, "k"))
    rules = (Rule("a", kind="shard", blocks=blocks),)
    assert program == Program(rules, {"heads": 2, "width": 2}, {"layer": (1, 2)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[rules]]", r"own\.toml: the file has an unknown field rules: did you mean rule\?"),
        ("[[rule]]\nmatch='a'\nto='a'\nkinds='x'", "unknown field kinds: did you mean kind"),
        ("[[rule]]\nmatch='a'\nblocks=[{sise=1}]", "a block of rule 'a' .*did you mean size"),
        ("[[rule]]\nto='a'", r"own\.toml: .*match"),
        ("[[rule", r"own\.toml: "),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Any, text: str, message: str) -> None:
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rules(tmp_path / "own.toml")


def test_shipped_rules_are_found_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"no rules are called 'megatron': there are hakari, llama"
    ):
        shipped("megatron")


SMALL: Any = {"vocabulary": 11, "dim": 8, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 6}
MODELS = [
    Model(**SMALL, tied=False),
    Model(**SMALL, tied=True),
    Model(**SMALL, tied=False, moe=MoE(experts=3, hidden=5), norm="layer", attention_bias=True),
]


@pytest.mark.parametrize("config", MODELS, ids=["dense", "tied", "experts"])
def test_hakari_rules_name_what_the_hugging_face_module_names(config: Model) -> None:
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in Transformer(config).named_parameters()}
    shapes = {n: s for n, s in shapes.items() if not (config.tied and n == "head.weight")}
    found = check(shipped("hakari"), shapes)
    for name, (rule, bindings) in found.items():
        count = range(shapes[name][0]) if rule.stack else range(1)
        own = [rule.targets[0].fill(bindings | {"expert": str(i)}) for i in count]
        assert own == places(name, config)


@pytest.mark.parametrize("config", [MODELS[0], MODELS[2]], ids=["dense", "experts"])
def test_hakari_rules_write_what_the_hugging_face_module_writes(
    config: Model, tmp_path: Any
) -> None:
    from safetensors.numpy import load_file

    model = Transformer(config)
    hugging_face.save(model, tmp_path / "saved")
    expected = load_file(tmp_path / "saved" / "model.safetensors")
    own = {n: p.detach().numpy().view(np.uint32) for n, p in model.named_parameters()}
    atoms = apply(shipped("hakari"), {ONE: held(own)})
    assert {n for n, _ in atoms.tensors} == {*expected}
    for name, values in expected.items():
        assert np.array_equal(atoms.array((name, "weight")), values.view(np.uint32))
    back = invert(shipped("hakari"), atoms)[ONE]
    assert all(np.array_equal(back.array((n, "weight")), a) for n, a in own.items())


def test_fused_llama_on_more_ranks_than_key_heads() -> None:
    """4 ranks, 2 key heads, by slicing with torch."""
    heads, kv, width, hidden, ffn, vocab = 4, 2, 2, 8, 8, 70
    chance = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens": (vocab, hidden),
        "lm_head": (vocab, hidden),
        "model.norm": (hidden,),
    }
    for layer in range(2):
        base = f"model.layers.{layer}."
        shapes |= {
            base + "input_layernorm": (hidden,),
            base + "post_attention_layernorm": (hidden,),
            base + "self_attn.q_proj": (heads * width, hidden),
            base + "self_attn.k_proj": (kv * width, hidden),
            base + "self_attn.v_proj": (kv * width, hidden),
            base + "self_attn.o_proj": (hidden, heads * width),
            base + "mlp.gate_proj": (ffn, hidden),
            base + "mlp.up_proj": (ffn, hidden),
            base + "mlp.down_proj": (hidden, ffn),
        }
    whole_ = {f"{n}.weight": chance.integers(0, 2**32, s, np.uint32) for n, s in shapes.items()}
    config = {"heads": heads, "kv_heads": kv, "head_dim": width, "vocab": vocab}
    program = shipped("llama-fused-qkv", config)
    slices = invert(program, held(whole_), tp=4, pp=2, counts={"layer": 2})
    base = "model.layers.1."
    for rank in range(4):
        one = slices[rank, 1, 0].array(("model.layers.0.self_attn.qkv_proj.weight", "weight"))
        q, k, v = (whole_[base + f"self_attn.{x}_proj.weight"] for x in "qkv")
        head = slice(rank // 2 * 2, rank // 2 * 2 + 2)
        assert np.array_equal(one, np.concatenate([q[2 * rank : 2 * rank + 2], k[head], v[head]]))
    assert slices[3, 1, 0].tensors["lm_head.weight", "weight"].shape == (64, hidden)
    back = weights(Program(program.rules, config, {"layer": 2}), slices)
    assert back == {name: a.tolist() for name, a in whole_.items()}


def test_megatron_deepspeed_patterns() -> None:
    """Two tensor-parallel ranks of two stages, cut by hand from the documented patterns."""
    chance = np.random.default_rng(1)

    def part(*shape: int) -> np.ndarray:
        return chance.normal(size=shape).astype(np.float32).view(np.uint32)

    shapes = {"dense": (4, 4), "query_key_value": (12, 4)}
    whole_ = {"1.word_embeddings.weight": part(7, 4), "4.weight": part(4), "4.bias": part(4)}
    for layer in (2, 3):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            whole_ |= {f"{layer}.{norm}.{kind}": part(4) for kind in ("weight", "bias")}
        for name, shape in shapes.items():
            whole_[f"{layer}.self_attention.{name}.weight"] = part(*shape)
            whole_[f"{layer}.self_attention.{name}.bias"] = part(shape[0])
        for name, shape in {"dense_h_to_4h": (16, 4), "dense_4h_to_h": (4, 16)}.items():
            whole_[f"{layer}.mlp.{name}.weight"] = part(*shape)
            whole_[f"{layer}.mlp.{name}.bias"] = part(shape[0])

    def cut(name: str, value: np.ndarray, rank: int) -> np.ndarray:
        if "word_embeddings" in name:
            return np.pad(value, ((0, 1), (0, 0)))[4 * rank : 4 * rank + 4]
        if re.search(r"(attention\.dense|4h_to_h)\.weight", name):
            return np.split(value, 2, 1)[rank]
        if "query_key_value" in name or "h_to_4h" in name:
            return np.split(value, 2)[rank]
        return value

    stage = {"1": 0, "2": 0, "3": 1, "4": 1}
    slices = {
        (t, p, 0): held({n: cut(n, v, t) for n, v in whole_.items() if stage[n[0]] == p})
        for t in range(2)
        for p in range(2)
    }
    shipped_ = shipped("megatron-deepspeed", {"vocab": 7, "vocab_multiple": 8})
    program = Program(shipped_.rules, shipped_.config, {"layer": (3, 2), "module": (3, 2)})
    assert weights(program, slices) == {name: a.tolist() for name, a in whole_.items()}
    drifted = slices[1, 1, 0]
    own = {k: drifted.array(k) for k in drifted.tensors}
    norm = own["4.weight", "weight"].view(np.float32)
    own["4.weight", "weight"] = (norm * np.float32(1.5)).view(np.uint32)
    averaged = apply(program, {**slices, (1, 1, 0): held(own)}).array(("4.weight", "weight"))
    expected = (norm.astype(np.float64) + (norm * np.float32(1.5)).astype(np.float64)) / 2
    assert np.array_equal(averaged.view(np.float32), expected.astype(np.float32))
