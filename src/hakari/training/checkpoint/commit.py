"""How a save becomes a checkpoint: all of it or nothing, whoever dies when.

1. Each process writes its data into `.tmp-step-N-ID`, has it on disk, then writes `ready-RANK`.
2. The coordinator, the process with rank 0, waits for all of them, checks that they tile every
   tensor and that copies agree, writes the manifest, then COMMIT.
3. It renames the folder to `step-N` and has that on disk: from here on the save counts.
4. It moves LATEST, then removes old checkpoints. If that fails, it is said, and the save counts.

Processes meet through files alone, so no collective runs outside the training thread. An object
store has no rename: there the data lie in `step-N` from the start and COMMIT alone decides.
"""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hakari.training.checkpoint import manifest as manifests
from hakari.training.checkpoint.boxes import Box, show, volume, within
from hakari.training.checkpoint.collector import collector_paused
from hakari.training.checkpoint.content import content, hexadecimal
from hakari.training.checkpoint.fragments import DamageError, Fragment
from hakari.training.checkpoint.manifest import COMMIT, Manifest, Stored
from hakari.training.checkpoint.retention import advance, named, prune
from hakari.training.checkpoint.shard_file import Part, write_parts
from hakari.training.checkpoint.source import WEIGHT, Group, Info, Key
from hakari.training.checkpoint.storage import Folder, open_folder, small

LARGE = 2**16
"""Elements of a piece that is hashed beside writing."""
RECORD = 2**31
"""Bytes of a rank's record that are read at most."""
FAILED = re.compile(r"failed-\d{5,}\.txt")  # whole, not one that is being written


class SaveError(OSError):
    """A save did not become a checkpoint; what was there before is untouched."""


@dataclass(frozen=True)
class Request:
    """What one process does in a save. Plain values: it can be handed to a writer process.

    pieces: all that the process holds, without values. mine: what of it is written here: (index
    of the piece, box). record: what is not a tensor: scalars, groups, ties, extra state.
    copies: 'equal' if those of several ranks must be, 'first' to take the first rank's.
    keep: newest checkpoints that are left, 0 for all. timeout: seconds to wait for others.
    """

    root: str
    step: int
    save_id: str
    rank: int
    world: int
    pieces: tuple[tuple[Key, Info, Box], ...]
    mine: tuple[tuple[int, Box], ...]
    record: Mapping[str, Any]
    copies: str = "equal"
    keep: int = 0
    timeout: float = 1800.0

    @property
    def folder(self) -> str:
        """Name of the folder that is written to before it counts."""
        return f".tmp-{named(self.step)}-{self.save_id[:8]}"


def carry_out(
    request: Request,
    values: Sequence[np.ndarray],
    gone: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = warnings.warn,
) -> str:
    """Write this process's share and see the save through; returns where the checkpoint is.

    values: the bits of each piece. gone: whether the training process has died, which ends it.
    tell: takes what the user should know of a save that was made.
    Raises OSError if the disk fails, SaveError if another process failed, TimeoutError if one
    does not answer, ValueError if the processes' states do not fit together.
    """
    root = open_folder(request.root)
    target = named(request.step)
    folder, notes = root.child(request.folder if root.renames else target), list[str]()
    try:
        record = _write_share(folder, request, values)
        _announce(root, folder, request, record if request.rank else {})
        if request.rank == 0:
            notes = _conclude(root, folder, request, record, gone)
    except FileNotFoundError as error:
        _fail(root, folder, request, error)
        raise _lost(request, error) from error
    except BaseException as error:
        _fail(root, folder, request, error)
        raise
    if request.rank:
        _await(root, folder, request, gone)
    for note in notes:
        tell(note)
    return f"{request.root.rstrip('/')}/{target}"


def _lost(request: Request, error: Exception) -> SaveError:
    return SaveError(
        f"the save of step {request.step} lost its files ({error}): another job may be saving into "
        f"{request.root}, or removing what it takes for leftovers; give each job a folder of its "
        "own"
    )


# --- each process -------------------------------------------------------------------------


@collector_paused()
def _write_share(folder: Folder, request: Request, values: Sequence[np.ndarray]) -> dict[str, Any]:
    """Have this process's data on disk; returns what the coordinator has to know."""
    parts = [_part(request, values, index, box) for index, box in request.mine]
    with ThreadPoolExecutor(1) as pool:  # beside writing; small ones would wait for one another
        large = pool.submit(_sums, request, values, True)
        sums = _sums(request, values, False)
        prefix = f"data/{request.save_id[:8]}-r{request.rank:05d}"
        written = write_parts(folder, prefix, parts, request.save_id)
        sums |= large.result()
        record = {
            "save_id": request.save_id,
            "files": {name: [s.bytes, s.header, s.crc] for name, s in written.files.items()},
            "fragments": [
                [*key, part.file, part.offset, part.box, part.crcs]
                for key, part in written.fragments
            ],
            "held": [
                [*key, info.dtype, info.shape, box, sums[index]]
                for index, (key, info, box) in enumerate(request.pieces)
            ],
            **request.record,
        }
    folder.sync()
    return record


def _sums(request: Request, values: Sequence[np.ndarray], large: bool) -> dict[int, int]:
    """Contents of the large pieces, or of the small ones, by their index."""
    return {
        index: content(values[index], box)
        for index, (_, _, box) in enumerate(request.pieces)
        if (volume(box) >= LARGE) == large
    }


def _part(request: Request, values: Sequence[np.ndarray], index: int, box: Box) -> Part:
    key, info, held = request.pieces[index]

    def mine() -> np.ndarray:
        return values[index] if box == held else values[index][within(box, held)]

    return Part(key, info, box, mine)


def _announce(root: Folder, folder: Folder, request: Request, record: dict[str, Any]) -> None:
    try:
        folder.write(_ready(request.rank), json.dumps(record).encode())
    except OSError:  # or the coordinator was faster, and has renamed the folder
        if request.rank == 0 or not _announced(root, folder, request):
            raise


def _announced(root: Folder, folder: Folder, request: Request) -> bool:
    """Whether the coordinator may have seen this process's record: then its data must stay.

    Records go only after the commit, so one that was seen is either there or committed.
    """
    return _ready(request.rank) in folder.entries() or _committed(root, request)


def report(request: Request, said: str) -> None:
    """Tell the other processes that this one's writer has died."""
    root = open_folder(request.root)
    folder = root.child(request.folder if root.renames else named(request.step))
    _fail(root, folder, request, SaveError(said))


def _ready(rank: int) -> str:
    return f"ready-{rank:05d}.json"


def _failed(rank: int) -> str:
    return f"failed-{rank:05d}.txt"


def _fail(root: Folder, folder: Folder, request: Request, error: BaseException) -> None:
    """Make room, and tell the others; nothing more can be done if that fails too."""
    try:
        if _committed(root, request) or (request.rank and _announced(root, folder, request)):
            return  # what failed came after
        _make_room(folder, request)
        folder.write(_failed(request.rank), f"{type(error).__name__}: {error}".encode())
    except OSError:
        pass


def _make_room(folder: Folder, request: Request) -> None:
    """Remove what this process wrote. Safe once any has failed: then none can commit."""
    mine = f"data/{request.save_id[:8]}-r{request.rank:05d}"
    for name in folder.names():
        if name.startswith(mine):
            folder.remove(name)


def _await(root: Folder, folder: Folder, request: Request, gone: Callable[[], bool]) -> None:
    """Wait until the coordinator has committed."""
    waiting = "rank 0, the coordinator, did not commit"
    _until(lambda: _committed(root, request), folder, request, gone, lambda: waiting)


def _committed(root: Folder, request: Request) -> bool:
    try:
        commit = json.loads(small(root.child(named(request.step)), COMMIT, 2**16))
    except (OSError, ValueError):
        return False
    return bool(commit.get("save_id") == request.save_id)


def _until(
    done: Callable[[], bool],
    folder: Folder,
    request: Request,
    gone: Callable[[], bool],
    missing: Callable[[], str],
) -> None:
    begun, pause = time.monotonic(), 0.001
    while not done():
        failures = [name for name in folder.entries() if FAILED.fullmatch(name)]
        if failures and not done():
            said = small(folder, failures[0], 2**20).decode(errors="replace")
            rank = int(failures[0][len("failed-") : -len(".txt")])
            _make_room(folder, request)
            raise SaveError(f"the save of step {request.step} failed on rank {rank}: {said}")
        if gone():
            raise SaveError(f"the save of step {request.step} was given up: training has ended")
        if time.monotonic() - begun > request.timeout:
            raise TimeoutError(
                f"the save of step {request.step} was given up after {request.timeout:g} s: "
                f"{missing()}"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


# --- the coordinator ----------------------------------------------------------------------


def _conclude(
    root: Folder,
    folder: Folder,
    request: Request,
    mine: Mapping[str, Any],
    gone: Callable[[], bool],
) -> list[str]:
    """Commit, and clean up; returns what the user should know."""
    wanted = [_ready(rank) for rank in range(request.world)]

    def missing() -> list[int]:
        there = set(folder.entries())
        return [rank for rank, name in enumerate(wanted) if name not in there]

    _until(lambda: not missing(), folder, request, gone, lambda: f"ranks {missing()} wrote nothing")
    with collector_paused():
        records = [mine, *(json.loads(small(folder, name, RECORD)) for name in wanted[1:])]
        found = merge(request, records)
        try:
            manifests.check_sizes(folder, found)  # another job may have removed some
        except DamageError as error:
            raise _lost(request, error) from error
        manifests.write(folder, found)
    target = named(request.step)
    if root.renames:
        if target in root.entries():
            raise FileExistsError(f"{request.root}/{target} exists: another save made it meanwhile")
        folder.sync()
        root.rename(request.folder, target)
    return [*_buffers_that_differ(request, records), *_cleaned(root, request, wanted)]


def _cleaned(root: Folder, request: Request, names: Sequence[str]) -> list[str]:
    """Remove the records, move LATEST, remove old checkpoints, up to what fails; returns that.

    In this order: what LATEST names must not go.
    """
    target = named(request.step)
    steps: list[tuple[str, Callable[[], object]]] = [
        *((f"remove {name}", partial(root.child(target).remove, name)) for name in names),
        ("move LATEST", partial(advance, root, target)),
    ]
    if request.keep:
        keep = partial(prune, request.root, request.keep, fresh=target)
        steps.append(("remove older checkpoints", keep))
    for what, work in steps:
        try:
            work()
        except (OSError, ValueError) as error:
            return [
                f"{request.root.rstrip('/')}/{target} is saved, but could not {what} "
                f"({type(error).__name__}: {error}); the next save tries again"
            ]
    return []


def _buffers_that_differ(request: Request, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Said of buffers of which rank 0's are saved, and that nobody makes equal."""
    if request.copies == "first":
        return []
    sums: dict[tuple[str, Box], set[int]] = {}
    for record in records:
        lone = {*record.get("buffers", ())} - {*record.get("broadcast", ())}
        for name, state, _, _, box, total in record["held"]:
            if name in lone and state == WEIGHT:
                sums.setdefault((name, _box(box)), set()).add(total)
    names = [*dict.fromkeys(name for (name, _), found in sums.items() if len(found) > 1)]
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [
        f"ranks hold different values of buffers ({', '.join(names[:3])}{more}): the first "
        "rank's are saved; copies='first' says so on purpose"
    ]


def merge(request: Request, records: Sequence[Mapping[str, Any]]) -> Manifest:
    """The manifest of what all processes wrote.

    Raises ValueError if copies differ, with tensor and ranks, or if other states do not fit.
    """
    first = records[0]
    _same_save(request, records)
    buffers = {name for record in records for name in record.get("buffers", ())}
    infos, contents = _contents(records, request.copies, buffers)
    fragments: dict[Key, list[Fragment]] = {key: [] for key in infos}
    files: dict[str, Stored] = {}
    for record in records:
        files |= {name: Stored(*row) for name, row in record["files"].items()}
        for name, state, file, offset, box, crcs in record["fragments"]:
            fragments[name, state].append(Fragment(_box(box), file, offset, tuple(crcs)))
    return Manifest(
        request.save_id,
        request.step,
        files,
        infos,
        {key: tuple(sorted(parts, key=lambda p: p.box)) for key, parts in fragments.items()},
        contents,
        _scalars(records),
        _merged_groups(records),
        "+".join(sorted({kind for r in records for kind in r["optimizer"].split("+") if kind})),
        tuple(sorted({tuple(names) for record in records for names in record["tied"]})),
        first["extra"],
        tuple(record["own"] for record in records),
        {name: tree for r in reversed(records) for name, tree in r.get("modules", {}).items()},
        {**first["origin"], "processes": request.world},
    )


def _same_save(request: Request, records: Sequence[Mapping[str, Any]]) -> None:
    for rank, record in enumerate(records):
        if record["save_id"] != request.save_id:
            raise ValueError(f"rank {rank} wrote for another save ({record['save_id']})")
        if record["extra"] != records[0]["extra"]:
            raise ValueError(
                f"extra_state differs between ranks 0 and {rank}: pass what differs as rank_state"
            )


def _contents(
    records: Sequence[Mapping[str, Any]], copies: str, buffers: Collection[str]
) -> tuple[dict[Key, Info], dict[Key, str]]:
    """What each tensor is and holds; boxes that several ranks hold must be equal.

    But for buffers: replicas' statistics differ by design, and the first rank's are taken.
    """
    infos: dict[Key, Info] = {}
    sums: dict[Key, dict[Box, tuple[int, int]]] = {}
    for rank, record in enumerate(records):
        for name, state, dtype, shape, box, total in record["held"]:
            key = (name, state)
            if key not in infos:
                infos[key], sums[key] = Info(tuple(shape), dtype), {}
            known, holder = sums[key].setdefault(_box(box), (total, rank))
            same = copies == "equal" and not (name in buffers and state == WEIGHT)
            if known != total and same:
                raise ValueError(
                    f"ranks {holder} and {rank} hold different values of {name} ({state}) "
                    f"{show(_box(box))}, which should be copies: nothing was saved. If they are "
                    "copies of one tensor that drifted, copies='first' takes the first rank's; "
                    "shards that no DTensor describes are given as pieces (flat_pieces)"
                )
    return infos, {
        key: hexadecimal(sum([total for total, _ in boxes.values()])) for key, boxes in sums.items()
    }


def _scalars(records: Sequence[Mapping[str, Any]]) -> dict[Key, Any]:
    found: dict[Key, tuple[Any, int]] = {}
    for rank, record in enumerate(records):
        for name, state, value in record["scalars"]:
            known, holder = found.setdefault((name, state), (value, rank))
            if known != value:
                raise ValueError(
                    f"{name} ({state}) is {known!r} on rank {holder} and {value!r} on rank {rank}"
                )
    return {key: value for key, (value, _) in found.items()}


def _merged_groups(records: Sequence[Mapping[str, Any]]) -> tuple[Group, ...]:
    """Groups of all ranks; those with equal options are one."""
    members: dict[str, dict[str, None]] = {}
    for record in records:
        for options, names in record["groups"]:
            members.setdefault(json.dumps(options, sort_keys=True), {}).update(dict.fromkeys(names))
    return tuple(Group(json.loads(options), tuple(names)) for options, names in members.items())


def _box(box: Any) -> Box:
    return tuple([(start, stop) for start, stop in box])
