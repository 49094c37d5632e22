"""Recorded numbers of public optimizers, and how each is reproduced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

ADAM = torch.optim.Adam
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def units_last(tensor: torch.Tensor) -> torch.Tensor:
    """Their units are on the last axis, ours on the first."""
    return tensor.movedim(-1, 0).contiguous()


def decayed_rate(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Their learning rate falls as (1 - step / 200)^2; ours is a schedule's business."""
    optimizer.param_groups[0]["lr"] = 0.1 * (1 - (step - 1) / 200) ** 2


def clipped_globally(optimizer: torch.optim.Optimizer, step: int) -> None:
    """They clip all gradients together to norm 1 first."""
    params = optimizer.param_groups[0]["params"]
    norm = torch.stack([p.grad.square().sum() for p in params]).sum().sqrt()
    for p in params:
        p.grad = p.grad / norm.clamp_min(1)


def nothing(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Gradients and settings stay as they are."""


@dataclass(frozen=True)
class Key:
    """How one recorded file is reproduced.

    key: file of tests/reference/other: p0_*, g1_* to g5_*, p1_*, p2_*, p5_*.
    name, options: what `build` gets.
    before: changes gradients or settings before a step.
    put: changes recorded tensors to our layout.
    apart: settings of a group of its own for tensors of one dimension.
    different: why the file is deliberately not reproduced; "" for reproduced.
    """

    key: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    before: Callable[[torch.optim.Optimizer, int], None] = nothing
    put: Callable[[torch.Tensor], torch.Tensor] = same
    apart: dict[str, Any] = field(default_factory=dict)
    different: str = ""


KEYS = (
    Key("lars_golmant", "lars", SGD, before=decayed_rate),
    Key("lars_golmant_epoch0", "lars", SGD),
    Key("lars_torchopt", "lars", SGD | {"eps": 1e-8}),
    Key("lars_kozistr", "lars", SGD, apart={"trust_coefficient": None, "weight_decay": 0.0}),
    Key("lamb_optax", "lamb", {"lr": 0.01, "weight_decay": 0.02}),
    Key("lamb_timm", "lamb", {"lr": 0.01, "weight_decay": 0.02}, before=clipped_globally),
    Key(
        "lamb_kozistr",
        "lamb",
        different="decay outside the ratio, |w| clamped to 10, second moment not corrected: none of it the paper's",
    ),
    Key("block_ngd_optax", "block-normalized", {"lr": 0.1, "momentum": 0.9}),
    Key("block_ngd_adam_optax", "block-normalized", {"lr": 0.01, "optimizer": ADAM}),
    Key(
        "normalized_sgd_optax",
        "block-normalized",
        different="normalizes all tensors together; the method has one norm for each",
    ),
    Key("sgd_gc", "gradient-centralization", SGD),
    Key("orig_sgd_gc", "gradient-centralization", SGD),
    Key("gc_optax", "gradient-centralization", SGD),
    Key("sgd_gcc", "gradient-centralization", SGD | {"conv_only": True}),
    Key("adam_gc", "gradient-centralization", {"lr": 0.01, "weight_decay": 0.01, "optimizer": ADAM, "place": "step"}),
    Key("adam_gc_loc", "gradient-centralization", {"lr": 0.01, "weight_decay": 0.01, "optimizer": ADAM}),
    Key("adamp", "adamp", {"lr": 0.01, "weight_decay": 0.05}),
    Key("adamp_proj", "adamp", {"lr": 0.01, "weight_decay": 0.05}),
    Key("sgdp", "sgdp", SGD | {"store_projected": True}),
    Key("sgdp_proj", "sgdp", SGD | {"store_projected": True}),
    Key("sgdp_nesterov", "sgdp", SGD | {"nesterov": True}),
    Key("adamsrt", "adamsrt", {"lr": 0.01, "weight_decay": 0.01}),
    Key("sgdmrt", "sgd-mrt", SGD),
    Key("grassmann_sgdg", "grassmann-sgd", {"lr": 0.1, "momentum": 0.9, "max_norm": None}),
    Key("grassmann_adamg", "grassmann-adam", {"lr": 0.05, "max_norm": 0.1}),
    Key("riemannian_bn_tf_sgdg", "grassmann-sgd", {"lr": 0.1, "momentum": 0.9, "max_norm": 0.5}, put=units_last),
    Key(
        "riemannian_bn_tf_sgdg_noclip",
        "grassmann-sgd",
        {"lr": 0.1, "momentum": 0.9, "max_norm": None},
        put=units_last,
    ),
    # their momentum is lost between the steps
    Key("stiefel_sgd_cayley", "cayley-sgd", {"lr": 0.1, "momentum": 0.0, "retraction": None}),
)

# files with one operation, not steps; test_reference compares each by itself
OPERATIONS = ("gc_op", "agc_op", "agc_official_jax", "path_sgd")
