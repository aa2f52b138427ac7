"""Train dense and mixture-of-experts language models on the hardware you have.

Each part can stand in another training loop: a layer, a router, batches with an exact cursor,
the split of a model over processes, checkpoints. `prepare`, `train_step` and `train` compose them.
"""

from hakari.training import checkpoint
from hakari.training.batches import Batch, Windows, rank_batch, validation_batches
from hakari.training.config import Config, Data, Model, MoE, Optimizer, Parallel
from hakari.training.config import load as load_config
from hakari.training.generation import generate
from hakari.training.hugging_face import load as load_hugging_face
from hakari.training.hugging_face import read_config as read_hugging_face_config
from hakari.training.hugging_face import save as save_hugging_face
from hakari.training.model import Transformer, initialise
from hakari.training.moe import balance
from hakari.training.moe.estimators import ESTIMATORS, Estimator, combine
from hakari.training.moe.experts import expert_mlp, grouped_matmul
from hakari.training.moe.health import LayerHealth, examine
from hakari.training.moe.layer import MixtureOfExperts, adjust_bias
from hakari.training.moe.router import Routing, route
from hakari.training.noise import token_keys, uniforms
from hakari.training.optimizer import clip, gradient_norm, learning_rate, make_optimizer
from hakari.training.parallel import make_mesh, parallelize, start_processes
from hakari.training.shards import Tokens, open_shards
from hakari.training.shards import prepare as prepare_shards
from hakari.training.sizing import Size, size
from hakari.training.step import Outcome, Trainer, make_work, prepare, train_step, validate
from hakari.training.trainer import train
from hakari.training.upcycling import upcycle

__all__ = [
    "ESTIMATORS",
    "Batch",
    "Config",
    "Data",
    "Estimator",
    "LayerHealth",
    "MixtureOfExperts",
    "MoE",
    "Model",
    "Optimizer",
    "Outcome",
    "Parallel",
    "Routing",
    "Size",
    "Tokens",
    "Trainer",
    "Transformer",
    "Windows",
    "adjust_bias",
    "balance",
    "checkpoint",
    "clip",
    "combine",
    "examine",
    "expert_mlp",
    "generate",
    "gradient_norm",
    "grouped_matmul",
    "initialise",
    "learning_rate",
    "load_config",
    "load_hugging_face",
    "make_mesh",
    "make_optimizer",
    "make_work",
    "open_shards",
    "parallelize",
    "prepare",
    "prepare_shards",
    "rank_batch",
    "read_hugging_face_config",
    "route",
    "save_hugging_face",
    "size",
    "start_processes",
    "token_keys",
    "train",
    "train_step",
    "uniforms",
    "upcycle",
    "validate",
    "validation_batches",
]
