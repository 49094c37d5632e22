"""Methods that differ in the area, against formulas written out in numpy."""

import numpy as np
import pytest
import torch

from normscope.core.errors import ArgumentError
from normscope.norms import Batch, BatchGroup, Group, Instance, InstanceGroup, Layer, Position, build
from normscope.norms.families.sequences import BatchNormLSTMCell
from tests import references

AREAS = (
    Batch(),
    Batch(2),
    Batch(2, "last"),
    BatchGroup(4),
    BatchGroup(4, 3),
    BatchGroup(4, 2, interleaved=True),
    Instance(),
    InstanceGroup(2),
    Group(4),
    Layer(),
    Layer("last"),
    Position("first"),
    Position("last"),
)


def maps(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape or (6, 8, 5, 4)) * 2 + 0.5


def close(found, expected, tolerance=1e-10):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("area", AREAS, ids=repr)
def test_split_copies_nothing_and_inverse_undoes_view(area, rank):
    last = getattr(area, "channels", "first") == "last"
    shape = (6, 3, 2, 5)[: rank - 1]
    x = torch.arange(6 * 8 * 30.0)[: int(np.prod(shape)) * 8].reshape((*shape, 8) if last else (6, 8, *shape[1:]))
    axis = area.axis(x, 8)
    z = area.split(x, axis)
    assert z.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert area.view(x, axis).ndim == 3
    assert area.samples(x, axis) == area.view(x, axis).shape[2]
    assert torch.equal(area.inverse(area.view(x, axis), x, axis), x)


@pytest.mark.parametrize(
    ("area", "axes"), [(Batch(), (0, 2, 3)), (Instance(), (2, 3)), (Layer(), (1, 2, 3)), (Position(), (1,))], ids=repr
)
def test_rows_hold_what_shares_statistics(area, axes):
    x = maps()
    z = area.view(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(np.sort(z.mean(2).ravel()), np.sort(x.mean(axes).ravel()))


def test_channels_are_found_by_rank_then_by_number():
    assert Layer().axis(torch.zeros(2, 5, 8), 8) == -1
    assert Layer().axis(torch.zeros(2, 8, 5), 8) == 1
    assert Layer().axis(torch.zeros(2, 8, 8), 8) == -1
    assert Layer("first").axis(torch.zeros(2, 8, 8), 8) == 1
    assert Layer().axis(torch.zeros(2, 8, 5, 5), 8) == 1
    assert Layer().axis(torch.zeros(2, 5, 5, 8), 8) == -1
    assert Layer("last").axis(torch.zeros(2, 8, 8, 8), 8) == -1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("bn", 8)(torch.zeros(4, 6, 3, 3)), r"x has shape \(4, 6, 3, 3\).*num_features=8.*axis 1"),
        (lambda: build("ln", 8)(torch.zeros(4, 6, 5)), r"num_features=8 expected on axis -1 or 1"),
        (lambda: build("bn", 8)(torch.zeros(8)), r"x has shape \(8,\).*at least \(N, C\)"),
        (lambda: build("gn", 8, groups=3), r"groups=3 does not divide num_features=8; divisors: \[1, 2, 4, 8\]"),
        (lambda: build("ghost", 8, examples=4)(torch.zeros(6, 8)), "examples=4 does not divide the batch of 6"),
        (lambda: build("bn", 8)(torch.zeros(1, 8)), "too few samples, 1: Standardize.* needs 2"),
        (lambda: build("in", 8)(torch.zeros(4, 8)), "too few samples, 1"),
        (lambda: build("ln", 8, channels="end"), "channels='end' is unknown; .*Options: auto, first, last"),
        (lambda: build("bn", 8, eps=0.0), "eps=0.0 must be above 0: constant channels"),
        (lambda: build("bn", 8, momentum=1.5), "momentum=1.5 must be between 0 and 1, or None"),
        (
            lambda: build("local-context", 8, window=(3, 3, 3))(torch.zeros(2, 8, 5, 5)),
            r"window=\(3, 3, 3\).*2 of them",
        ),
        (lambda: build("region", 8)(torch.zeros(2, 8, 5, 5)), r"mask=None must have the shape \(2, 1, 5, 5\)"),
        (lambda: build("recurrent-batch", 8)(torch.zeros(1, 8)), "1 sample to each statistic"),
    ],
)
def test_errors_name_argument_value_and_way_out(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_ghost_batches_need_no_multiple_in_evaluation():
    layer = build("ghost", 8, examples=4).double()
    layer(torch.from_numpy(maps(8, 8, 3, 5)))
    x = maps(7, 8, 3, 5)
    mean, square = (v.numpy().reshape(8, 1, 1) for v in (layer.running_mean, layer.running_square))
    close(layer.eval()(torch.from_numpy(x)), (x - mean) / np.sqrt(square - mean**2 + 1e-5))


def test_feature_standardization_divides_by_no_less_than_eps():
    x = maps()
    x[:, 0] = 3.0
    y = build("feature-standardization", 8, eps=0.5).double()(torch.from_numpy(x))
    sd = np.maximum(x.std((0, 2, 3), keepdims=True), 0.5)
    close(y, (x - x.mean((0, 2, 3), keepdims=True)) / sd)


def test_local_context_uses_the_nearest_whole_window():
    x = maps(2, 4, 6, 5)
    close(build("local-context", 4, window=3).double()(torch.from_numpy(x)), references.local_context(x, 2, 3))


def test_local_context_with_large_windows_is_group_normalization():
    x = maps(2, 4, 6, 5)
    grouped = references.standardized(x.reshape(2, 2, -1), (2,), ddof=1).reshape(x.shape)
    close(build("local-context", 4).double()(torch.from_numpy(x)), grouped)


def test_local_contrast():
    x = maps(2, 3, 6, 5)
    layer = build("local-contrast", 3, window=5, sigma=1.3).double()
    close(layer(torch.from_numpy(x)), references.local_contrast(x, 5, 1.3))


def test_local_response():
    x = maps(2, 7, 3, 3)
    layer = build("local-response", 7, size=4, alpha=0.3, beta=0.6, k=1.5).double()
    expected = torch.nn.functional.local_response_norm(torch.from_numpy(x), 4, 0.3, 0.6, 1.5)
    close(layer(torch.from_numpy(x)), expected.numpy())
    odd = build("local-response", 7, size=5, alpha=0.3).double()
    close(odd(torch.from_numpy(x)), references.local_response(x, 5, 0.3, 0.75, 2.0))


def test_divisive_with_two_windows():
    x = maps(2, 3, 6, 5)
    layer = build("divisive", 3, sum_window=3, sup_window=5, sigma=0.7).double()
    close(layer(torch.from_numpy(x)), references.divisive(x, 3, 5, 0.7))
    published = build("divisive", 3, sum_window=3, sup_window=5, sigma=0.7, published=True).double()
    assert not torch.allclose(published(torch.from_numpy(x)), layer(torch.from_numpy(x)))


def test_divisive_learns_sigma():
    layer = build("divisive", 3, learn_sigma=True)
    layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert layer.deviation.grad.abs() > 0


def test_thumbnail_statistics_come_from_the_thumbnail():
    x, thumbnail = maps(4, 3, 5, 5), maps(1, 3, 4, 4, seed=1)
    y = build("thumbnail-instance", 3).double()(torch.from_numpy(x), torch.from_numpy(thumbnail))
    mean, var = thumbnail.mean((2, 3), keepdims=True), thumbnail.var((2, 3), keepdims=True, ddof=1)
    close(y, (x - mean) / np.sqrt(var + 1e-5))


def test_region_and_rest_are_standardized_apart():
    x, mask = maps(), (maps(6, 1, 5, 4, seed=1) > 0.5).astype(float)
    layer = build("region", 8).double()
    close(layer(torch.from_numpy(x), torch.from_numpy(mask)), references.region(x, mask))
    with torch.no_grad():
        layer.bias[0] = 1.0
    close(layer(torch.from_numpy(x), torch.from_numpy(mask)), references.region(x, mask) + mask)


def test_region_with_the_published_bias():
    x, mask = maps(), (maps(6, 1, 5, 4, seed=1) > 0.5).astype(float)
    layer = build("region", 8, published=True).double()
    with torch.no_grad():
        layer.bias[0] = 1.0
    close(layer(torch.from_numpy(x), torch.from_numpy(mask)), references.region(x, mask) + 1)


def test_recurrent_statistics_belong_to_a_step():
    layer = build("recurrent-batch", 4, steps=3, momentum=1.0).double()
    x = [maps(6, 4, seed=step) for step in range(4)]
    for step, value in enumerate(x):
        y = layer(torch.from_numpy(value), step)
        close(y, 0.1 * references.standardized(value, (0,)), 1e-7)
    assert layer.num_batches_tracked.tolist() == [1, 1, 2]
    close(layer.running_mean, np.stack([x[0].mean(0), x[1].mean(0), x[3].mean(0)]))
    close(layer.running_var[2], x[3].var(0, ddof=1))
    layer.eval()
    expected = 0.1 * (x[0] - x[1].mean(0)) / np.sqrt(x[1].var(0, ddof=1) + 1e-5)
    close(layer(torch.from_numpy(x[0]), 1), expected, 1e-7)


def test_lstm_cell_normalizes_both_products_and_the_cell():
    torch.manual_seed(0)
    cell = BatchNormLSTMCell(3, 5, steps=2).double()
    x, h, c = torch.randn(7, 3).double(), torch.randn(7, 5).double(), torch.randn(7, 5).double()
    gates = 0.1 * references.standardized((h @ cell.hidden.weight.T).detach().numpy(), (0,))
    gates = gates + 0.1 * references.standardized((x @ cell.input.weight.T).detach().numpy(), (0,))
    f, i, o, g = np.split(gates, 4, 1)
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    new = sigmoid(f) * c.numpy() + sigmoid(i) * np.tanh(g)
    found_h, found_c = cell(x, (h, c), 0)
    close(found_c, new, 1e-7)
    close(found_h, sigmoid(o) * np.tanh(0.1 * references.standardized(new, (0,))), 1e-7)


@pytest.mark.parametrize("per", ["sequence", "frame"])
def test_padding_enters_no_statistics(per):
    x, lengths = maps(5, 4, 3), np.array([4, 2, 3, 4, 1])
    layer = build("recurrent-batch-input", 3, per=per, momentum=1.0).double()
    y = layer(torch.from_numpy(x), torch.from_numpy(lengths)).detach().numpy()
    valid = np.arange(4) < lengths[:, None]
    parts = [valid] if per == "sequence" else [valid & (np.arange(4) == t) for t in range(4)]
    for part in parts:
        np.testing.assert_allclose(y[part], references.standardized(x[part], (0,)), atol=1e-10)
    assert (y[~valid] == 0).all()
    close(layer.running_mean, np.mean([x[part].mean(0) for part in parts], 0))
    close(layer.running_var, np.mean([x[part].var(0, ddof=1) for part in parts], 0))
