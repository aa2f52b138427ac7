"""Universal checkpoints: save once, resume on any split, never load a wrong byte.

    save(path, model, optimizer, extra_state, step=1000, asynchronous=True)
    load(path, model, optimizer)

Tensors are saved as boxes of logical tensors, so that loading on another number of processes is
an intersection of boxes and needs no conversion (arXiv 2406.18820; universal-checkpoints.md).
"""

from typing import TYPE_CHECKING

from hakari.lazy import on_demand

if TYPE_CHECKING:
    from hakari.training.checkpoint.commit import SaveError
    from hakari.training.checkpoint.conversion import convert, export_atoms
    from hakari.training.checkpoint.formats import Target, detect, open_any, write_any
    from hakari.training.checkpoint.fragments import DamageError
    from hakari.training.checkpoint.inspection import Difference, Inspection, diff, inspect
    from hakari.training.checkpoint.language.assembly import apply, invert
    from hakari.training.checkpoint.language.rules import Block, Program, Rule, load_rules, shipped
    from hakari.training.checkpoint.loading import Loaded, load
    from hakari.training.checkpoint.pieces import Piece, flat_pieces, tensor_pieces
    from hakari.training.checkpoint.retention import (
        clear_leftovers,
        latest,
        leftovers,
        prune,
        steps,
    )
    from hakari.training.checkpoint.saving import save, wait
    from hakari.training.checkpoint.snapshot import Save
    from hakari.training.checkpoint.source import Group, Info, Source
    from hakari.training.checkpoint.stored import open_checkpoint
    from hakari.training.checkpoint.verification import Damage, Report, verify

__all__ = [
    "Block",
    "Damage",
    "DamageError",
    "Difference",
    "Group",
    "Info",
    "Inspection",
    "Loaded",
    "Piece",
    "Program",
    "Report",
    "Rule",
    "Save",
    "SaveError",
    "Source",
    "Target",
    "apply",
    "clear_leftovers",
    "convert",
    "detect",
    "diff",
    "export_atoms",
    "flat_pieces",
    "inspect",
    "invert",
    "latest",
    "leftovers",
    "load",
    "load_rules",
    "open_any",
    "open_checkpoint",
    "prune",
    "save",
    "shipped",
    "steps",
    "tensor_pieces",
    "verify",
    "wait",
    "write_any",
]

if not TYPE_CHECKING:  # type checkers see the imports above
    __getattr__ = on_demand(
        __name__,
        {
            "commit": "SaveError",
            "conversion": "convert export_atoms",
            "formats": "Target detect open_any write_any",
            "fragments": "DamageError",
            "inspection": "Difference Inspection diff inspect",
            "language.assembly": "apply invert",
            "language.rules": "Block Program Rule load_rules shipped",
            "retention": "clear_leftovers latest leftovers prune steps",
            "loading": "Loaded load",
            "pieces": "Piece flat_pieces tensor_pieces",
            "saving": "save wait",
            "snapshot": "Save",
            "source": "Group Info Source",
            "stored": "open_checkpoint",
            "verification": "Damage Report verify",
        },
    )
