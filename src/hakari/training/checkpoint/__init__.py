"""Universal checkpoints: save once, resume on any split, never load a wrong byte.

    save(path, model, optimizer, extra_state, step=1000, asynchronous=True)
    load(path, model, optimizer)

Tensors are saved as boxes of logical tensors, so that loading on another number of processes is
an intersection of boxes and needs no conversion (arXiv 2406.18820; universal-checkpoints.md).
"""

from hakari.training.checkpoint.commit import SaveError
from hakari.training.checkpoint.convert import convert, export_atoms
from hakari.training.checkpoint.fragments import DamageError
from hakari.training.checkpoint.latest import clear_leftovers, latest, leftovers, prune, steps
from hakari.training.checkpoint.loading import Loaded, load
from hakari.training.checkpoint.pieces import Piece, flat_pieces, tensor_pieces
from hakari.training.checkpoint.saving import save, wait
from hakari.training.checkpoint.snapshot import Save
from hakari.training.checkpoint.source import Group, Info, Source
from hakari.training.checkpoint.stored import open_checkpoint

__all__ = [
    "DamageError",
    "Group",
    "Info",
    "Loaded",
    "Piece",
    "Save",
    "SaveError",
    "Source",
    "clear_leftovers",
    "convert",
    "export_atoms",
    "flat_pieces",
    "latest",
    "leftovers",
    "load",
    "open_checkpoint",
    "prune",
    "save",
    "steps",
    "tensor_pieces",
    "wait",
]
