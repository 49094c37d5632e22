"""The table of optimizers: a row for each, and `build`, which makes one from its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch

from normscope.core.errors import ArgumentError, unknown_name
from normscope.core.named import Named
from normscope.gradients.grassmann import GrassmannAdam, GrassmannSGD
from normscope.gradients.layerwise import CLARS, LAMB, LANS, LARS
from normscope.gradients.optimizer import Params
from normscope.gradients.path import PathSGD
from normscope.gradients.projected import SGDP, AdamP
from normscope.gradients.projection import FineGrainedSGD, ProjectionSGD
from normscope.gradients.row import Row
from normscope.gradients.spherical import PSISGD, SGDMRT, AdamS, AdamSRT
from normscope.gradients.stiefel import CayleyAdam, CayleySGD
from normscope.gradients.transform import AdaptiveClipped, BlockNormalized, Centralized, Transform


def _around(transform: Callable[..., Transform], names: tuple[str, ...]) -> Callable[..., torch.optim.Optimizer]:
    """Return what makes a transform around an optimizer that it makes too; `names` are the transform's settings."""

    def make(
        params: Params,
        lr: float = 0.1,
        *,
        optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        **options: Any,
    ) -> torch.optim.Optimizer:
        own = {name: options.pop(name) for name in names if name in options}
        inner: Callable[..., torch.optim.Optimizer] = optimizer
        return transform(inner(params, lr=lr, **options), **own)

    return make


ROWS: tuple[Row, ...] = (
    Row(
        "block-normalized",
        "S105",
        _around(BlockNormalized, ("adaptive", "small")),
        "lr/|w|",
        ("optim:block-normalized",),
        ("ngd",),
        ("block_ngd_optax", "block_ngd_adam_optax"),
        BlockNormalized,
    ),
    Row(
        "lars",
        "S106",
        LARS,
        "lr trust",
        ("optim:lars",),
        (),
        ("lars_golmant", "lars_golmant_epoch0", "lars_kozistr", "lars_torchopt"),
    ),
    Row("lamb", "S107", LAMB, "lr trust", ("optim:lamb",), (), ("lamb_optax", "lamb_timm")),
    Row("lans", "S108", LANS, "lr trust", ("optim:lans",)),
    Row("clars", "S109", CLARS, "lr trust", ("optim:clars",)),
    Row(
        "gradient-centralization",
        "S110",
        _around(Centralized, ("place", "conv_only")),
        "lr/|w|^2",
        ("optim:gradient-centralization",),
        ("gc",),
        ("sgd_gc", "sgd_gcc", "orig_sgd_gc", "adam_gc", "adam_gc_loc", "gc_optax", "gc_op"),
        Centralized,
    ),
    Row(
        "adaptive-gradient-clipping",
        "S111",
        _around(AdaptiveClipped, ("clipping", "floor")),
        "lr/|w|^2",
        ("optim:adaptive-gradient-clipping",),
        ("agc",),
        ("agc_op", "agc_official_jax"),
        AdaptiveClipped,
    ),
    Row("adamp", "S120", AdamP, "lr/|w|", ("optim:adamp-sgdp",), ("adamp-sgdp",), ("adamp", "adamp_proj")),
    Row("sgdp", "S120", SGDP, "lr/|w|^2", ("optim:adamp-sgdp",), (), ("sgdp", "sgdp_nesterov", "sgdp_proj")),
    Row("adamsrt", "S122", AdamSRT, "lr/|w|", ("optim:adamsrt",), (), ("adamsrt",)),
    Row("adams", "S122", AdamS, "lr/|w|", ("optim:adamsrt",)),
    Row("sgd-mrt", "S122", SGDMRT, "lr/|w|^2", ("optim:adamsrt",), (), ("sgdmrt",)),
    Row(
        "grassmann-sgd",
        "S114",
        GrassmannSGD,
        "lr",
        ("optim:riemannian-batch",),
        ("riemannian-batch",),
        ("grassmann_sgdg", "riemannian_bn_tf_sgdg", "riemannian_bn_tf_sgdg_noclip"),
    ),
    Row("grassmann-adam", "S114", GrassmannAdam, "lr", ("optim:riemannian-batch",), (), ("grassmann_adamg",)),
    Row(
        "cayley-sgd",
        "S104",
        CayleySGD,
        "lr",
        ("optim:cayley-sgd-adam",),
        ("cayley-sgd-adam",),
        ("stiefel_sgd_cayley",),
    ),
    Row("cayley-adam", "S104", CayleyAdam, "lr", ("optim:cayley-sgd-adam",)),
    Row("fine-grained-manifold", "S096", FineGrainedSGD, "lr", ("optim:fine-grained-manifold",), ("fg-sgd",)),
    Row("psi-manifold", "S118", PSISGD, "lr", ("optim:psi-manifold",), ("psi-sgd",)),
    Row("path-normalized", "S113", PathSGD, "lr/|w|^2", ("optim:path-normalized",), ("path-sgd",), ("path_sgd",)),
    Row("projection-weight-norm", "S126", ProjectionSGD, "lr", ("optim:projection-weight-norm",), ("pbwn",)),
)


zoo: Final = Named(ROWS, "optimizers: name, effective learning rate, source", lambda row: f"{row.step:<12}{row.source}")


def build(name: str, params: Params, *, lr: float | None = None, **options: Any) -> torch.optim.Optimizer:
    """Build an optimizer by name.

    Args:
        name: a name of the survey's catalog after the colon, or an alias as "gc"; see `zoo`.
        params: parameters or groups, as `torch.optim` takes them.
        lr: learning rate; the method's default if not given.
        **options: further settings of the method. A transform of gradients takes `optimizer=`, the class that makes its
            steps (`torch.optim.SGD` by default), and that class's settings.

    Returns:
        The optimizer; an unknown name or option is an ArgumentError with the closest ones.

    Raises:
        ArgumentError: an option that the method needs is missing.

    >>> build("lars", [torch.ones(2, 3, requires_grad=True)], lr=0.5).param_groups[0]["trust_coefficient"]
    0.001
    """
    row = zoo[name]
    known = row.settings(options.get("optimizer"))
    for option in options:
        _check(option, known, name)
    missing = [key for key, p in known.items() if p.default is p.empty and key not in options]
    if missing:
        raise ArgumentError(f"name={name!r} needs {', '.join(missing)}; call build({name!r}, ..., {missing[0]}=...).")
    return row.make(params, **options) if lr is None else row.make(params, lr=lr, **options)


def _check(option: str, known: Iterable[str], name: str) -> None:
    if option not in known:
        raise unknown_name("option", option, known, f"These are the settings of {name!r}.")
