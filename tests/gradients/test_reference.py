"""Recorded numbers of public optimizers over five steps, in float64."""

import pytest
import torch
from torch import nn

from normscope.gradients import build, zoo
from normscope.gradients.path import path_scales
from normscope.gradients.transform import centralize, clip_units
from tests.gradients.keys import KEYS, OPERATIONS
from tests.norms.keys.key import FOLDER, recorded_once

torch.set_num_threads(1)

REPRODUCED = [key for key in KEYS if not key.different]


def close(found, expected):
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("key", REPRODUCED, ids=lambda key: key.key)
def test_reproduced(key):
    data = {name: key.put(value) for name, value in recorded_once(key.key).items()}
    suffixes = [name.removeprefix("p0") for name in data if name.startswith("p0")]
    params = [nn.Parameter(data[f"p0{suffix}"].clone()) for suffix in suffixes]
    groups = [{"params": [p for p in params if p.ndim > 1]}, {"params": [p for p in params if p.ndim == 1]} | key.apart]
    optimizer = build(key.name, groups if key.apart else params, **key.options)
    compared = 0
    for step in range(1, 6):
        for p, suffix in zip(params, suffixes, strict=True):
            p.grad = data[f"g{step}{suffix}"].clone()
        key.before(optimizer, step)
        optimizer.step()
        for p, suffix in zip(params, suffixes, strict=True):
            if f"p{step}{suffix}" in data:
                close(p, data[f"p{step}{suffix}"])
                compared += 1
    assert compared == 3 * len(params)


def test_centralization_of_one_gradient():
    data = recorded_once("gc_op")
    close(centralize(data["g_conv"]), data["gc_conv"])
    close(centralize(data["g_lin"]), data["gc_lin"])
    close(centralize(data["g_lin"], 4), data["gcc_lin"])


def test_clipping_of_one_gradient():
    data = recorded_once("agc_op")
    for name in ("conv", "lin", "bias"):
        for author in ("timm", "kozistr"):
            close(clip_units(data[f"w_{name}"], data[f"g_{name}"], 0.01), data[f"{author}_{name}"])


def test_clipping_as_the_authors_do_it_with_units_on_the_last_axis():
    data = recorded_once("agc_official_jax")
    for name in ("conv", "lin", "bias", "zero"):
        w, g = data[f"w_{name}"].movedim(-1, 0), data[f"g_{name}"].movedim(-1, 0)
        for author in ("out", "optax"):
            close(clip_units(w, g, 0.01), data[f"{author}_{name}"].movedim(-1, 0))


def test_path_scales_and_steps():
    data = recorded_once("path_sgd")
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(data["w0"])
        model[2].weight.copy_(data["w1"])
    scales = path_scales(model, dict(model.named_parameters()), (4,))
    for place, name in enumerate(("0.weight", "2.weight")):
        close(scales[name], data[f"patched_scale_{place}"])
    # their step is ours times a ratio from their first call; their second call adds up scales and is not reproduced
    optimizer = build("path-normalized", model.parameters(), lr=float(data["patched_ratio"]), model=model, shape=(4,))
    model[0].weight.grad, model[2].weight.grad = data["g0_0"].clone(), data["g0_1"].clone()
    optimizer.step()
    close(data["w0"] - model[0].weight, data["patched_out0_0"])
    close(data["w1"] - model[2].weight, data["patched_out0_1"])


def test_every_key_is_accounted_for():
    names = [key.key for key in KEYS]
    assert len(names) == len(set(names))
    reproduced = {key.key for key in KEYS if not key.different} | set(OPERATIONS)
    assert {name for row in zoo.values() for name in row.keys} == reproduced
    assert {path.stem for path in (FOLDER / "other").glob("*.npz")} >= reproduced
