"""Universal checkpoints: save once, resume on any split, never load a wrong byte.

    save(path, model, optimizer, extra_state, step=1000, asynchronous=True)
    load(path, model, optimizer)

Tensors are saved as boxes of logical tensors, so that loading on another number of processes is
an intersection of boxes and needs no conversion (arXiv 2406.18820; universal-checkpoints.md).
"""

from hakari.training.checkpoint.assembly import apply, invert
from hakari.training.checkpoint.commit import SaveError
from hakari.training.checkpoint.convert import convert, export_atoms
from hakari.training.checkpoint.formats import Target, detect, open_any, write_any
from hakari.training.checkpoint.fragments import DamageError
from hakari.training.checkpoint.inspection import Difference, Inspection, diff, inspect
from hakari.training.checkpoint.latest import clear_leftovers, latest, leftovers, prune, steps
from hakari.training.checkpoint.loading import Loaded, load
from hakari.training.checkpoint.pieces import Piece, flat_pieces, tensor_pieces
from hakari.training.checkpoint.rules import Block, Program, Rule, load_rules, shipped
from hakari.training.checkpoint.saving import save, wait
from hakari.training.checkpoint.snapshot import Save
from hakari.training.checkpoint.source import Group, Info, Source
from hakari.training.checkpoint.stored import open_checkpoint
from hakari.training.checkpoint.verify import Damage, Report, verify

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
