"""Train dense and mixture-of-experts language models on the hardware you have.

Each part can stand in another training loop: a layer, a router, batches with an exact cursor,
the split of a model over processes, checkpoints. `prepare`, `train_step` and `train` compose them.
"""

from typing import TYPE_CHECKING

from hakari.lazy import on_demand

if TYPE_CHECKING:
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
    from hakari.training.parallel import (
        leave_processes,
        make_mesh,
        parallelize,
        start_processes,
    )
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
    "leave_processes",
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

if not TYPE_CHECKING:  # type checkers see the imports above
    __getattr__ = on_demand(
        __name__,
        {
            "checkpoint": ":checkpoint",
            "batches": "Batch Windows rank_batch validation_batches",
            "config": "Config Data Model MoE Optimizer Parallel load_config=load",
            "generation": "generate",
            "hugging_face": "load_hugging_face=load save_hugging_face=save "
            "read_hugging_face_config=read_config",
            "model": "Transformer initialise",
            "moe.balance": ":balance",
            "moe.estimators": "ESTIMATORS Estimator combine",
            "moe.experts": "expert_mlp grouped_matmul",
            "moe.health": "LayerHealth examine",
            "moe.layer": "MixtureOfExperts adjust_bias",
            "moe.router": "Routing route",
            "noise": "token_keys uniforms",
            "optimizer": "clip gradient_norm learning_rate make_optimizer",
            "parallel": "leave_processes make_mesh parallelize start_processes",
            "shards": "Tokens open_shards prepare_shards=prepare",
            "sizing": "Size size",
            "step": "Outcome Trainer make_work prepare train_step validate",
            "trainer": "train",
            "upcycling": "upcycle",
        },
    )
