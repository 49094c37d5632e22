"""Methods that differ in the operation, against formulas written out in numpy."""

import math

import numpy as np
import pytest
import torch

from normscope.core.errors import ArgumentError
from normscope.norms import Batch, Lp, Norm, Running, Standardize, build
from tests import references
from tests.norms.test_areas import close, maps


def moments(x):
    return x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)


def tokens(seed=0):
    return np.random.default_rng(seed).normal(size=(6, 5, 8)) + 0.3


def test_rms_inside_and_outside_the_root():
    x = tokens()
    square = (x**2).mean(-1, keepdims=True)
    close(build("rms", 8, eps=0.1).double()(torch.from_numpy(x)), x / np.sqrt(square + 0.1))
    outside = build("rms", 8, eps=0.1, inside=False).double()
    close(outside(torch.from_numpy(x)), x / (np.sqrt(square) + 0.1))


def test_partial_rms_takes_the_first_entries():
    x = tokens()
    layer = build("rms", 8, eps=1e-8, inside=False, fraction=0.4, shift=True).double()
    rms = np.sqrt((x[..., :3] ** 2).mean(-1, keepdims=True))
    close(layer(torch.from_numpy(x)), x / (rms + 1e-8))
    assert layer.bias.shape == (8,)


def test_rms_with_a_unit_offset_starts_as_the_plain_one():
    x = torch.from_numpy(tokens())
    layer = build("rms", 8, offset=1.0).double()
    assert layer.weight.abs().max() == 0
    close(layer(x), build("rms", 8).double()(x).detach().numpy())


def test_rms_of_maps_takes_whole_examples_or_positions():
    x = maps()
    close(build("rms", 8).double()(torch.from_numpy(x)), x / np.sqrt((x**2).mean((1, 2, 3), keepdims=True) + 1e-6))
    position = build("rms", 8, position=True).double()
    close(position(torch.from_numpy(x)), x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6))


def test_pixel_norm_has_no_parameters():
    x = maps()
    layer = build("pixel", 8).double()
    close(layer(torch.from_numpy(x)), x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-8))
    assert not list(layer.parameters())


def test_variance_only_layer_keeps_the_mean():
    x = tokens()
    layer = build("variance-only-layer", 8).double()
    close(layer(torch.from_numpy(x)), x / np.sqrt(x.var(-1, keepdims=True) + 1e-5))


def test_l1_batch_stores_the_mean_deviation():
    x = maps()
    layer = build("l1-batch", 8, momentum=1.0).double()
    mean, _ = moments(x)
    deviation = np.abs(x - mean).mean((0, 2, 3), keepdims=True)
    close(layer(torch.from_numpy(x)), (x - mean) / (deviation + 1e-5))
    close(layer.running_deviation, deviation.ravel())
    close(layer.eval()(torch.from_numpy(2 * x)), (2 * x - mean) / (deviation + 1e-5))


def test_constants_for_gaussian_samples():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 4, 20, 20)))
    assert build("l1-batch", 4, gaussian=True).double()(x).std().item() == pytest.approx(1, abs=0.01)
    # the published constant of the maximum leaves 0.7, for any number of samples
    for samples in (x, x[:20]):
        assert build("lp-batch", 4, p=math.inf).double()(samples).std().item() == pytest.approx(0.7, abs=0.1)
    # the range over chunks is that of a Gaussian only roughly
    assert build("range-batch", 4).double()(x).std().item() == pytest.approx(1, abs=0.2)


def test_lp_of_the_third_power():
    x = maps()
    mean, _ = moments(x)
    power = (np.abs(x - mean) ** 3).mean((0, 2, 3), keepdims=True)
    close(build("lp-batch", 8, p=3).double()(torch.from_numpy(x)), (x - mean) * (power + 1e-5) ** (-1 / 3))


@pytest.mark.parametrize("pair", ["absolute", "semideviation", "range", "superquantile", "worst-case"])
def test_generalized_pairs_of_statistic_and_deviation(pair):
    x = maps()
    layer = build("generalized-batch", 8, pair=pair, momentum=1.0).double()
    y = layer(torch.from_numpy(x)).detach().numpy()
    for c in range(8):
        center, deviation = references.deviations(x[:, c].ravel(), pair)
        np.testing.assert_allclose(y[:, c], (x[:, c] - center) / (deviation + 1e-5), atol=1e-10)
        assert layer.running_center[c] == pytest.approx(center)
        assert layer.running_deviation[c] == pytest.approx(deviation)


def test_streaming_mixes_the_batch_with_the_averages():
    first, second = maps(), maps(seed=1)
    layer = build("streaming", 8, short=0.3, momentum=0.2).double()

    def statistics(x):
        mean, _ = moments(x)
        return mean, np.abs(x - mean).mean((0, 2, 3), keepdims=True)

    mean, deviation = statistics(first)
    close(layer(torch.from_numpy(first)), (first - mean) / (deviation + 1e-5))
    y = layer(torch.from_numpy(second))
    averages = [0.8 * old + 0.2 * new for old, new in zip((mean, deviation), statistics(second), strict=True)]
    mean, deviation = (0.7 * old + 0.3 * new for old, new in zip(averages, statistics(second), strict=True))
    close(y, (second - mean) / (deviation + 1e-5), 1e-9)
    evaluated = layer.eval()(torch.from_numpy(first))
    close(evaluated, (first - averages[0]) / (averages[1] + 1e-5), 1e-9)


def test_range_of_chunks():
    x = maps(4, 3, 4, 6)
    rows = references.channel_rows(x)
    chunks = rows.reshape(3, 16, 6)
    constant = 0.175 * (1 + math.sqrt(math.pi * math.log(4))) / math.sqrt(2 * math.log(6))
    spread = constant * (chunks.max(2) - chunks.min(2)).mean(1)
    mean, _ = moments(x)
    close(build("range-batch", 3).double()(torch.from_numpy(x)), (x - mean) / (spread[None, :, None, None] + 1e-5))


@pytest.mark.parametrize("statistics", ["batch", "running", "mean"])
def test_robust_evaluation_uses_what_it_says(statistics):
    x, other = maps(), maps(seed=1)
    layer = build("robust", 8, statistics=statistics, momentum=1.0).double()

    def normalized(values, center, spread):
        reach = lambda v: v.max((0, 2, 3), keepdims=True) - v.min((0, 2, 3), keepdims=True)  # noqa: E731
        return (values - center.mean((0, 2, 3), keepdims=True)) / (reach(spread) ** 0.2 + 1e-5)

    close(layer(torch.from_numpy(x)), normalized(x, x, x))
    center = other if statistics == "batch" else x
    spread = x if statistics == "running" else other
    close(layer.eval()(torch.from_numpy(other)), normalized(other, center, spread))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Lp(p=0.5), "p=0.5 must be at least 1"),
        (lambda: build("rms", 8, fraction=0.0), r"fraction=0.0 must be above 0 and at most 1"),
        (lambda: build("generalized-batch", 8, pair="median"), "pair='median' is unknown; .*Options: absolute"),
        (lambda: build("robust", 8, statistics="ema"), "statistics='ema' is unknown"),
        (
            lambda: Norm(Batch(), Standardize(), population=Running(track=("median",)), num_features=4)(
                torch.rand(3, 4)
            ),
            "track='median' is no statistic of .*mean, var",
        ),
        (lambda: Norm(Batch(), Standardize(), population=Running()), r"num_features is missing: Running\(\)"),
    ],
)
def test_errors_name_argument_value_and_way_out(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_a_constant_channel_has_no_infinite_gradient():
    for name in ("rms", "l1-batch", "lp-batch", "robust", "range-batch", "pixel", "feature-standardization"):
        x = torch.zeros(6, 4, 3, 3, requires_grad=True)
        build(name, 4)(x).sum().backward()
        assert torch.isfinite(x.grad).all(), name
