"""Programs of rules that say what the tensors of some framework's processes are parts of.

    program = shipped("megatron-gpt", {"heads": 32, "kv_heads": 8, "head_dim": 128, ...})

A program is total and unambiguous: one rule for each tensor, no rule without one. Every rule is
a map of indices, so what it does is proved before anything is read, and can be undone; `assembly`
does both. (universal-checkpoints.md B3)
"""

from __future__ import annotations

import ast
import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

from hakari.training.checkpoint.language.model_config import TOLD
from hakari.training.checkpoint.language.patterns import Pattern, outline, read_match, read_template
from hakari.training.checkpoint.language.rows import ORDERS, SPLITS, Cut, Layout, Order, Split

AXES = ("tp", "pp", "ep")
KINDS = ("unique", "replicated", "average", "shard")
Number = int | str
"""A number, or an expression of names in the program's config with + - * // and parentheses."""


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a slice: `size` rows, over all ranks, of the tensor `to`.

    to: '' is the rule's own. unit, split, order: as of `rows.Cut`. In `size`, `rows` is the number
    of rows of all blocks together.
    """

    size: Number = "rows"
    to: str = ""
    unit: Number = 1
    split: Split = "even"
    order: Order = ""


@dataclass(frozen=True)
class Rule:
    """What the tensors are whose whole name `match` matches.

    match: a regular expression with groups, and text, in which dots are escaped, between them.
    to: name of the atom: '{1}' and '{name}' are groups, '{layer - 3}' a shifted number.
    kind: 'shard' (over the axis `over`, along `dim`), or the same on all ranks: 'replicated'
    (check = 'bitwise', or 'first' to believe the first) or 'average' (of copies that differ by
    `max_rel_diff` at most); 'unique': there is one. copies: of a shard, too, there may be copies.
    blocks, groups: rows of a slice, in that many rounds (or size, unit, split, order of the only
    block). pad: the slices' rows are filled up with zeros to a multiple of this.
    stack: names of the slices' leading dimensions, each index of which is a tensor of its own;
    at: groups that number the leading dimensions of the atom. dim does not count either.
    local: groups that are counted from 0 on each rank of an axis, such as {layer = 'pp'};
    across: those that are spread over it too, but counted on.
    on: ranks of an axis, such as {pp = ['pp_size - 1']}, that have it; else it is all or one.
    optional: it may match nothing. tie: the atom has other rules, this is a copy. written: False
    for names that are understood, but not written.
    """

    match: str
    to: str = ""
    kind: str = "unique"
    dim: int = 0
    over: str = "tp"
    check: str = "bitwise"
    max_rel_diff: float = 0.0
    copies: bool = False
    size: Number = "rows"
    unit: Number = 1
    split: Split = "even"
    order: Order = ""
    blocks: tuple[Block, ...] = ()
    groups: Number = 0
    pad: Number = 0
    stack: tuple[str, ...] = ()
    at: tuple[str, ...] = ()
    local: Mapping[str, str] = field(default_factory=dict)
    across: Mapping[str, str] = field(default_factory=dict)
    on: Mapping[str, tuple[Number, ...]] = field(default_factory=dict)
    optional: bool = False
    tie: bool = False
    written: bool = True

    def __post_init__(self) -> None:
        with about(str(self)):
            for problem in _problems(self):
                raise ValueError(problem)

    def __str__(self) -> str:
        return f"rule {self.match!r}"

    @cached_property
    def pattern(self) -> Pattern:
        """`match`, both ways."""
        return read_match(self.match)

    @cached_property
    def own_blocks(self) -> tuple[Block, ...]:
        """The blocks, or the one that the rule's own fields describe."""
        whole = Block(self.size, self.to, self.unit, self.split, self.order)
        return tuple(replace(b, to=b.to or self.to) for b in self.blocks) or (whole,)

    @cached_property
    def targets(self) -> tuple[Pattern, ...]:
        """Names of the atoms, in the order of the blocks."""
        names = dict.fromkeys(block.to for block in self.own_blocks)
        groups = {**self.pattern.groups, **dict.fromkeys(self.stack, r"\d+")}
        return tuple(read_template(name, groups) for name in names)

    @property
    def spread(self) -> dict[str, str]:
        """Groups whose number says on which rank of an axis a tensor is."""
        return {**self.local, **self.across}

    @property
    def how(self) -> str:
        """What is done with copies, as `rows.Part` names it."""
        return "average" if self.kind == "average" else self.check

    @property
    def has_copies(self) -> bool:
        """Whether several ranks may hold the same rows."""
        return self.copies or self.kind in ("replicated", "average")


@dataclass(frozen=True)
class Program:
    """Rules, values for their expressions, and how many of a `local` number each rank has.

    counts: such as {'layer': (5, 4)}; a plain number is divided evenly over the ranks.
    name: of the file, for messages.
    """

    rules: tuple[Rule, ...]
    config: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    name: str = field(default="", compare=False)


RULE_FILES = resources.files("hakari.training.checkpoint.language") / "rule_files"


def shipped(name: str, config: Mapping[str, int] | None = None) -> Program:
    """A program that comes with hakari, such as 'megatron-gpt'; config: values it needs.

    Raises ValueError that lists the names there are.
    """
    if not (file := RULE_FILES / f"{name}.toml").is_file():
        raise ValueError(f"no rules are called {name!r}: there are {', '.join(shipped_names())}")
    with resources.as_file(file) as path:
        return replace(load_rules(path, config), name=name)


def shipped_names() -> list[str]:
    """Names of the programs that come with hakari."""
    files = [own.name for own in RULE_FILES.iterdir() if own.name.endswith(".toml")]
    return sorted(file.removesuffix(".toml") for file in files)


def load_rules(file: str | Path, config: Mapping[str, int] | None = None) -> Program:
    """The program in a TOML file: tables [config] and [counts], and a [[rule]] for each rule.

    config: values beside, or instead of, those in the file.
    Raises ValueError that names the file, the rule, and the field that is wrong.
    """
    try:
        table = tomllib.loads(Path(file).read_text(encoding="utf-8"))
        _known(table, ("config", "counts", "rule"), "the file")
        rules = tuple(_rule(entry) for entry in table.get("rule", []))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None
    counts = {name: _tupled(count) for name, count in table.get("counts", {}).items()}
    return Program(rules, table.get("config", {}) | dict(config or {}), counts, str(file))


def check(program: Program, names: Iterable[str]) -> dict[str, tuple[Rule, dict[str, str]]]:
    """The rule of each tensor and what its groups are.

    Raises ValueError that lists names without a rule (and the rule that is nearest), names with
    two or more, and rules, other than optional ones, without a name.
    """
    found = {
        name: [(rule, b) for rule in program.rules if (b := rule.pattern.solve(name)) is not None]
        for name in names
    }
    nearest = {outline(rule.match): rule.match for rule in program.rules}
    raise_faults(found, program.rules, nearest)
    return {name: matches[0] for name, matches in found.items()}


def raise_faults(
    found: Mapping[str, list[tuple[Rule, dict[str, str]]]],
    rules: Iterable[Rule],
    nearest: Mapping[str, str],
) -> None:
    """Raise ValueError unless each name has one rule and each rule that is not optional a name."""
    faults = []
    for name, matches in found.items():
        own = [rule.match for rule, _ in matches]
        if not own:
            close = difflib.get_close_matches(outline(name), nearest, 1, 0.6)
            hint = f" (the nearest is {nearest[close[0]]!r})" if close else ""
            faults.append(f"{name} has no rule{hint}")
        elif len(own) > 1:
            faults.append(f"{name} has {len(own)} rules: {', '.join(map(repr, own))}")
    used = {rule.match for matches in found.values() for rule, _ in matches}
    faults += [
        f"{rule} matches nothing: set optional = true if that may be"
        for rule in rules
        if rule.match not in used and not rule.optional
    ]
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ValueError("the rules do not fit: " + "; ".join(faults[:20]) + more)


@contextmanager
def about(what: str) -> Iterator[None]:
    """Say in a ValueError what it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


# --- numbers ------------------------------------------------------------------------------


def need_numbers(program: Program, used: Iterable[Rule]) -> None:
    """Raise ValueError that lists all names in the rules that are used for which there is no value.

    What only rules that match nothing name is not needed.
    """
    matches = {rule.match for rule in used}
    known = {*program.config, "rows", *(f"{axis}_size" for axis in AXES)}
    own = [_expressions(rule) for rule in program.rules if rule.match in matches]
    lost = dict.fromkeys(n for each in own for e in each for n in _names(e) if n not in known)
    if lost:
        rules = f"rules {program.name}" if program.name else "the rules"
        told = [name for name in TOLD if name in lost]
        names = list(dict.fromkeys((*told, *lost)))
        config = " or --config FOLDER" if told else ""
        raise ValueError(
            f"{rules} need {', '.join(names)}: give --set {names[0]}=...{config} "
            "(in Python: config)"
        )


def _expressions(rule: Rule) -> list[Number]:
    blocks = [number for block in rule.own_blocks for number in (block.size, block.unit)]
    return [*blocks, rule.groups, rule.pad, *(n for ranks in rule.on.values() for n in ranks)]


def _names(expression: Number) -> list[str]:
    try:
        nodes = ast.walk(ast.parse(str(expression), mode="eval"))
        return [node.id for node in nodes if isinstance(node, ast.Name)]
    except (SyntaxError, RecursionError):  # what `evaluate` will say
        return []


def evaluate(expression: Number, values: Mapping[str, int]) -> int:
    """The value of an expression. Raises ValueError for other syntax and for unknown names."""
    if isinstance(expression, int):
        return expression
    try:
        return _value(ast.parse(expression, mode="eval").body, values)
    except (SyntaxError, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"{expression!r}: {error}") from None


def _value(node: ast.expr, values: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in values:
            raise ValueError(f"no value for {node.id}: give it in config (has {[*values]})")
        return values[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, values)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, values), _value(node.right, values)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.FloorDiv):
            return left // right
    raise ValueError(f"{ast.unparse(node)!r} is not a number, a name, + - * // or parentheses")


def layout(rule: Rule, values: Mapping[str, int], rows: int) -> Layout:
    """The rule's blocks with numbers; rows: of all of them together."""
    values = {**values, "rows": rows}
    names = [target.text for target in rule.targets]
    cuts = tuple(
        Cut(
            evaluate(block.size, values),
            names.index(block.to),
            evaluate(block.unit, values),
            block.split,
            block.order,
        )
        for block in rule.own_blocks
    )
    pad = evaluate(rule.pad, values)
    total = sum(cut.rows for cut in cuts)
    ranks = values[f"{rule.over}_size"] if rule.kind == "shard" else 1
    return Layout(cuts, ranks, evaluate(rule.groups, values), -(-total // pad) * pad if pad else 0)


# --- tables -------------------------------------------------------------------------------


def _rule(entry: Mapping[str, Any]) -> Rule:
    what = f"rule {entry.get('match', '?')!r}"
    _known(entry, [f.name for f in fields(Rule)], what)
    table = {name: _tupled(value) for name, value in entry.items() if name != "blocks"}
    for block in entry.get("blocks", ()):
        _known(block, [f.name for f in fields(Block)], f"a block of {what}")
    blocks = [{k: _tupled(v) for k, v in block.items()} for block in entry.get("blocks", ())]
    return Rule(**table, blocks=tuple(Block(**block) for block in blocks))


def _tupled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _tupled(inner) for name, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _known(table: Mapping[str, Any], names: Iterable[str], what: str) -> None:
    for name in table:
        if name not in (known := [*names]):
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"{what} has an unknown field {name}: {hint}")


def _problems(rule: Rule) -> Iterator[str]:
    for name, value, known in (
        ("kind", rule.kind, KINDS),
        ("over", rule.over, AXES),
        ("check", rule.check, ("bitwise", "first")),
        *(("split", block.split, SPLITS) for block in rule.own_blocks),
        *(("order", block.order, ORDERS) for block in rule.own_blocks),
        *(("an axis of on", axis, AXES) for axis in rule.on),
        *(("an axis of local or across", axis, AXES) for axis in rule.spread.values()),
    ):
        if isinstance(value, str) and value not in known:
            yield f"{name} = {value!r}: known are {', '.join(map(repr, known))}"
    if rule.blocks and (rule.size, rule.unit, rule.split, rule.order) != ("rows", 1, "even", ""):
        yield "size, unit, split and order stand in each of the blocks, or there are no blocks"
    if rule.pad and rule.size == "rows":
        yield "pad needs size, the number of rows without padding"
    if not all(block.to for block in rule.own_blocks):
        yield "it says not what it is part of: set to"
    groups = rule.pattern.groups
    for name in sorted({*rule.at} - {*groups, *rule.stack} | {*rule.spread} - {*groups}):
        yield f"{name} in at, local or across is not a group of match: the groups are {[*groups]}"
    for target, name in product(rule.targets, [*groups, *rule.stack]):
        holes = [part[0] for part in target.parts if not isinstance(part, str)]
        if (name not in holes) and name not in rule.at:
            yield f"to = {target.text!r} forgets {name}, so it cannot be undone: name it"
