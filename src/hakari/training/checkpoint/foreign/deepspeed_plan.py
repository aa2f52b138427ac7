"""What DeepSpeed needs in its files beside tensors: from the source, a template, or made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from hakari.training.checkpoint.foreign.deepspeed_files import open_save
from hakari.training.checkpoint.foreign.deepspeed_model import STATE, extra, options, shapes
from hakari.training.checkpoint.foreign.deepspeed_zero import in_order, round_robin
from hakari.training.checkpoint.foreign.torch_values import Record
from hakari.training.checkpoint.source import WEIGHT, Group, Source
from hakari.training.checkpoint.storage import Location

TEMPLATE = "template= (--config), a ZeRO save of the run that shall load"
"""What to give, in Python and to the command."""
VERSION = "0.19.0"
"""Release whose layout is written; it is put into files of a source that names none."""
SUB_GROUP = 10**9
"""DeepSpeed's default of sub_group_size, in elements of one rank."""
SCHEDULE = "lr_scheduler"
"""Key of the schedule's state, in DeepSpeed's files and in a run's own extra state."""
ADDRESS = "deepspeed.utils.tensor_fragment.fragment_address"
SCALER = "deepspeed.runtime.fp16.loss_scaler.LossScaler"
SCALERS = (SCALER, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler")
CONSTANT = Record(SCALER, (), {"cur_scale": 1.0, "dynamic": False})
"""The loss scaler of runs in fp32 and bf16."""


@dataclass(frozen=True)
class Plan:
    """What is written, but for the tensors' elements.

    groups: with members in the order in which the run that loads lays them out. precision: of
    the module's copies of trained parameters. engine, optimizer, client, lr_scheduler: values.
    """

    groups: tuple[Group, ...]
    frozen: tuple[str, ...]
    buffers: tuple[str, ...]
    precision: str
    engine: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    client: Mapping[str, Any]
    lr_scheduler: Any
    scaler: Record | None
    whole_steps: bool = False

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's DeepSpeed configuration, as far as it is known."""
        config = self.engine.get("ds_config")
        return config if isinstance(config, Mapping) else {}

    @property
    def dealt(self) -> bool:
        """Whether ZeRO-1 or 2 deals parameters out to the ranks (round_robin_gradients)."""
        return round_robin(self.config)

    @property
    def version(self) -> str:
        """The release that the files say they are of."""
        return str(self.engine.get("ds_version") or VERSION)


def make_plan(
    source: Source,
    template: Location | None = None,
    precision: str | None = None,
    frozen: Sequence[str] | None = None,
) -> Plan:
    """Collect what is needed.

    template: a ZeRO save of the run that shall load, which gives the order of parameters, the
    configuration and the loss scaler and, where DeepSpeed did not save the source, the client's
    values and the schedule. Raises ValueError for a source without optimizer groups, or whose
    parameters are not those of the template.
    """
    values = _values(source)
    groups = source.groups
    if template is not None:
        theirs, groups = _from_template(source, template)
        values = _merged(values, theirs, source)
    _check_groups(source, groups)
    trained = {name for group in groups for name in group.members}
    others = [n for n, state in source.tensors if state == WEIGHT and n not in trained]
    known = values.get("buffers")
    if frozen is None:
        frozen = [] if known is None else [name for name in others if name not in known]
    plan = Plan(
        groups=groups,
        frozen=tuple(frozen),
        buffers=tuple(name for name in others if name not in frozen),
        precision="F32",
        engine=_mapping(values.get("engine")),
        optimizer=_mapping(values.get("optimizer")),
        client=_mapping(values.get("client")),
        lr_scheduler=values.get("lr_scheduler"),
        scaler=None,
        whole_steps=bool(values.get("whole_steps")),
    )
    return replace(plan, precision=precision or _precision(plan), scaler=_scaler(plan))


def from_deepspeed(source: Source) -> bool:
    """Whether DeepSpeed saved it, and it has its values, and its order of parameters, still."""
    return {"lr_scheduler", "engine", "optimizer", "client"} <= set(_mapping(source.extra))


def address(start: int, count: int) -> Record:
    """DeepSpeed's note of where a parameter lies in a partition."""
    return Record(ADDRESS, (), {"numel": count, "start": start})


def sub_groups(plan: Plan, source: Source, processes: int) -> list[tuple[int, list[str]]]:
    """ZeRO-3's sub-groups: (optimizer group, members), each closed once it is large enough."""
    zero = plan.config.get("zero_optimization")
    most = int(_mapping(zero).get("sub_group_size", SUB_GROUP))
    found: list[tuple[int, list[str]]] = []
    for index, group in enumerate(plan.groups):
        sizes = [-(-prod(source.tensors[n, WEIGHT].shape) // processes) for n in group.members]
        if most >= sum(sizes):
            found.append((index, list(group.members)))
            continue
        part: list[str] = []
        held = 0
        for name, size in zip(group.members, sizes, strict=True):
            part, held = [*part, name], held + size
            if held >= most or name == group.members[-1]:
                found.append((index, part))
                part, held = [], 0
    return found


def _check_groups(source: Source, groups: Sequence[Group]) -> None:
    if not groups:
        raise ValueError(
            "the source has no optimizer groups, by which DeepSpeed orders parameters: give "
            f"{TEMPLATE}"
        )
    if not all("lr" in group.options for group in groups):
        raise ValueError(
            "the source has no options (lr, ...) of its optimizer groups, which DeepSpeed's "
            f"optimizers load: give {TEMPLATE}"
        )
    for name in (name for group in groups for name in group.members):
        if (name, WEIGHT) not in source.tensors:
            raise ValueError(f"the source has no {name}, which an optimizer group names")


def _values(source: Source) -> dict[str, Any]:
    """What the source brings: values of DeepSpeed's if it came from there, else the client's."""
    if from_deepspeed(source):
        return dict(source.extra)
    schedule, rest = _scheduled(source.extra)
    client = {} if rest is None else {"client": {"extra": rest}}
    return client if schedule is None else {**client, SCHEDULE: schedule}


def _scheduled(extra: Any) -> tuple[Mapping[str, Any] | None, Any]:
    """The schedule's state in what a run of another framework saved, and the rest; or None."""
    schedule = _mapping(extra).get(SCHEDULE)
    if not isinstance(schedule, Mapping):
        return None, extra
    return schedule, {key: value for key, value in extra.items() if key != SCHEDULE} or None


def client_extra(source: Source) -> list[str]:
    """Names of what a run of another framework saved that becomes DeepSpeed's client state."""
    _, rest = (None, None) if from_deepspeed(source) else _scheduled(source.extra)
    return [*map(str, rest)] if isinstance(rest, Mapping) else [] if rest is None else ["extra"]


def misfit(source: Source, template: Location | None) -> str:
    """Why the schedule's state in a source is not what the run that shall load has; '' if it is."""
    own = _values(source).get(SCHEDULE)
    if from_deepspeed(source) or own is None or template is None:
        return ""
    theirs = _from_template(source, template)[0][SCHEDULE]
    if fits(own, theirs):
        return ""
    return f"it has {', '.join(map(str, own))}; that of {template} {', '.join(map(str, theirs))}"


def _from_template(source: Source, template: Location) -> tuple[dict[str, Any], tuple[Group, ...]]:
    save = open_save(template, None)
    if save.stage == 0 or len(save.slices) > 1:
        raise ValueError(
            f"{save.folder.where} is no template: a ZeRO save without model parallelism"
        )
    model, first = save.slices[0].models[0], save.slices[0].optimizers[0]
    named = shapes(model)
    saved = first.get(STATE)
    if save.stage == 3:
        base = saved[STATE]
        members = [[n for sub in g["params"] for n in named[sub]] for g in base["param_groups"]]
    else:
        base = saved["base_optimizer_state"]
        config = model.tree.get("ds_config")
        members = [in_order(list(group), config, save.dp) for group in named]
    given = base["param_groups"] if isinstance(base, Mapping) else [{} for _ in members]
    pairs = zip(given, members, strict=True)
    theirs = [Group(options(group), tuple(names)) for group, names in pairs]
    states = base["state"].values() if isinstance(base, Mapping) else base
    steps = [state.get("step") for state in states]
    values = extra(save.folder, model, saved)
    values["whole_steps"] = any(isinstance(step, int) for step in steps)
    return values, _reordered(source, theirs, save.folder.where)


def _merged(own: dict[str, Any], theirs: dict[str, Any], source: Source) -> dict[str, Any]:
    """Values for a run that is configured as the template's and stands where the source does."""
    engine, kept = dict(theirs["engine"]), _mapping(own.get("engine"))
    behind = (source.step or 0) - engine.get("global_steps", 0)
    if behind:
        for key in ("global_samples", "skipped_steps", "data_sampler"):
            engine.pop(key, None)
    configured = ("ds_config", "ds_version", "universal_checkpoint_info")
    engine |= {key: value for key, value in kept.items() if key not in configured}
    scaler = _mapping(own.get("optimizer")).get("loss_scaler")
    saved = theirs["optimizer"]
    if _mapping(scaler).get("class") == _mapping(saved.get("loss_scaler")).get("class"):
        saved = {**saved, "loss_scaler": scaler}
    schedule = own[SCHEDULE] if kept else _moved_on(theirs[SCHEDULE], behind)
    if not kept and fits(own.get(SCHEDULE), theirs[SCHEDULE]):
        schedule = own[SCHEDULE]
    merged = {"engine": engine, "optimizer": saved, "lr_scheduler": schedule}
    return {**theirs, **merged, "client": own.get("client") or theirs["client"]}


def fits(schedule: Any, theirs: Any) -> bool:
    """Whether a schedule's state is of the kind that a save has, or may be as that has none."""
    return bool(schedule) and (not theirs or {*_mapping(schedule)} == {*_mapping(theirs)})


def _moved_on(schedule: Any, steps: int) -> Any:
    """A schedule's state so many steps later: DeepSpeed's own count; of others, none is known."""
    if not steps:
        return schedule
    if set(_mapping(schedule)) == {"last_batch_iteration"}:
        return {"last_batch_iteration": schedule["last_batch_iteration"] + steps}
    return None


def _reordered(source: Source, theirs: Sequence[Group], where: str) -> tuple[Group, ...]:
    """The source's groups in a template's order; options are the template's if it has none."""
    if not source.groups:
        return tuple(theirs)
    mine = {name: group for group in source.groups for name in group.members}
    groups = []
    for group in theirs:
        first = mine.get(group.members[0])
        apart = [name for name in group.members if first is None or mine.get(name) is not first]
        if first is None or apart:
            raise ValueError(f"{apart[0]} is not in a group with {group.members[0]}, as in {where}")
        groups.append(Group(first.options or group.options, group.members))
    more = set(mine) - {name for group in theirs for name in group.members}
    if more:
        raise ValueError(f"{min(more)} is in the source's optimizer, but not in that of {where}")
    return tuple(groups)


def _precision(plan: Plan) -> str:
    for name, dtype in (("bf16", "BF16"), ("bfloat16", "BF16"), ("fp16", "F16")):
        if _mapping(plan.config.get(name)).get("enabled"):
            return dtype
    return "F32"


def _scaler(plan: Plan) -> Record | None:
    """The loss scaler as DeepSpeed pickles it, where one is known.

    Raises ValueError for another class: the file that it was read from can name any.
    """
    saved = plan.optimizer.get("loss_scaler")
    if not isinstance(saved, Mapping) or "class" not in saved:
        return None
    if saved["class"] not in SCALERS:
        raise ValueError(
            f"the optimizer's loss_scaler is of {str(saved['class'])[:120]!r}, which who loads the "
            f"files would execute, not one of DeepSpeed's ({', '.join(SCALERS)}): leave it out of "
            "the source's extra['optimizer']"
        )
    state = {key: value for key, value in saved.items() if key not in ("class", "args", "items")}
    return Record(saved["class"], tuple(saved.get("args") or ()), state)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
