"""Moments against float64 numpy, in every layout and precision that a network has."""

import numpy as np
import pytest
import torch

from normscope.probes import layout, moments
from normscope.probes.summary import summarize


def draw(*shape, mean=0.0, std=1.0, dtype=torch.float32, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (mean + std * values).to(dtype)


def channels(x, axis):
    """Return the values as float64 numpy [rows, channels]."""
    x = x.double() if x.dim() > 1 else x.double().reshape(-1, 1)
    return x.movedim(axis, -1).reshape(-1, x.shape[axis]).numpy()


def observed(x, axis):
    state = host(moments.observe(layout.channeled(x, axis)))
    return moments.compute(state), state


def host(state):
    """Return the state as the array [3, C] that the record is made from."""
    (array,) = moments.states([state._replace(mean=state.mean.double().numpy(), var=state.var.double().numpy())])
    return array


def check(x, axis, tolerance=2e-5, shift=0.0):
    """Compare with numpy; errors of the mean are measured in standard deviations, `shift` of them are allowed."""
    found, state = observed(x, axis)
    rows = channels(x, axis)
    np.testing.assert_array_equal(state[0], len(rows))
    np.testing.assert_allclose(found["var"], rows.var(0), rtol=tolerance)
    np.testing.assert_allclose(found["rms"], np.sqrt((rows**2).mean(0)), rtol=1e-5)
    error = np.abs(found["mean"] - rows.mean(0)) / np.maximum(rows.std(0), 1e-300)
    assert error.max() <= tolerance + shift


LAYOUTS = {
    "NCHW": (draw(8, 5, 16, 16, mean=3, std=2), 1),
    "NCHW, one place": (draw(64, 5, 1, 1), 1),
    "NCDHW": (draw(3, 5, 4, 4, 4), 1),
    "channels last": (draw(8, 5, 9, 9, mean=1).to(memory_format=torch.channels_last), 1),
    "NCL": (draw(8, 5, 30), 1),
    "rows": (draw(200, 5, mean=-2), -1),
    "three dimensions, channels last": (draw(8, 30, 5), -1),
    "channels first": (draw(5, 70), 0),
    "transposed rows": (draw(5, 70).T, -1),
    "sliced": (draw(16, 10, 9, 9)[::2, ::2, 1:, 1:], 1),
    "one sample": (draw(1, 5, 8, 8), 1),
    "vector": (draw(100), -1),
    "more rows than are summed at once": (draw(40_000, 3, mean=2), -1),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_layouts_and_precisions(name, dtype):
    x, axis = LAYOUTS[name]
    check(x.to(dtype), axis)


@pytest.mark.parametrize(
    ("x", "axis"),
    [
        (draw(8, 5, 16, 16, mean=1000), 1),
        (draw(8, 5, 16, 16, mean=1000).to(memory_format=torch.channels_last), 1),
        (draw(2000, 5, mean=1000), -1),
        (draw(8, 5, 300, mean=-1000), 1),
        (draw(50_000, 3, mean=1000), -1),
        (draw(1, 2, 512, 512, mean=100), 1),
        (draw(1, 2, 512, 512, mean=30), 1),
    ],
    ids=["NCHW", "channels last", "rows", "NCL", "many rows", "large planes", "large planes, less so"],
)
def test_a_mean_far_above_the_deviation(x, axis):
    check(x, axis, tolerance=2e-3, shift=5e-3)


def test_one_value_per_channel_has_no_spread():
    found, state = observed(torch.tensor([[2.0, -3.0]]), -1)
    assert found["mean"].tolist() == [2, -3]
    assert found["var"].tolist() == [0, 0]
    assert found["rms"].tolist() == [2, 3]
    assert state[0].tolist() == [1, 1]
    found, _ = observed(torch.tensor(4.0), -1)
    assert (found["mean"].tolist(), found["var"].tolist()) == ([4], [0])


@pytest.mark.parametrize("dims", [(), (1, 5, 1, 1)], ids=["one value", "one per channel"])
def test_expanded_gradients(dims):
    x = draw(*dims).expand(4, 5, 6, 6)
    assert 0 in x.stride()
    found, state = observed(x, 1)
    np.testing.assert_allclose(found["mean"], channels(x, 1).mean(0), rtol=1e-6)
    assert (found["var"] < 1e-12).all()
    assert state[0].tolist() == [144] * 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(6, 5, 4, 4), (6, 5, 1), (60, 5)])
@pytest.mark.parametrize("mean", [0, 1000])
def test_a_bad_value_spoils_its_channel_only(bad, shape, mean):
    x = draw(*shape, mean=mean)
    x[(1, 2, *[0] * (len(shape) - 2))] = bad
    found, state = observed(x, 1)
    good = [0, 1, 3, 4]
    rows = channels(x, 1)[:, good]
    for name, reference in (("mean", rows.mean(0)), ("var", rows.var(0))):
        assert not np.isfinite(found[name][2])
        np.testing.assert_allclose(found[name][good], reference, rtol=2e-3, atol=1e-6)
    (row,) = summarize("moments", [("m/output", "value")], [state], 1.0)
    assert dict(zip(row.stats, row.values, strict=True))["nonfinite"] == 1


def test_zeros_are_dead_and_exactly_so():
    x = torch.zeros(4, 3, 5, 5)
    x[0, 2, 0, 0] = 1e-12
    _, state = observed(x, 1)
    (row,) = summarize("moments", [("m/output", "value")], [state], 1.0)
    assert dict(zip(row.stats, row.values, strict=True))["dead"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("axis", [1, -1])
def test_merge_is_associative_commutative_and_equals_one_pass(axis):
    x = draw(30, 6, 8, mean=5, dtype=torch.float64)
    a, b, c = (moments.observe(layout.channeled(part, axis)) for part in x.split([3, 10, 17]))
    whole = moments.observe(layout.channeled(x, axis))
    left = moments.merge(moments.merge(a, b), c)
    for other in (moments.merge(a, moments.merge(b, c)), moments.merge(c, moments.merge(b, a)), whole):
        np.testing.assert_allclose(host(left), host(other), rtol=1e-12, atol=1e-12)


def test_merge_of_means_that_differ():
    x = torch.cat([draw(10, 3, mean=-1e6, dtype=torch.float64), draw(90, 3, mean=1e6, dtype=torch.float64)])
    state = moments.merge(*(moments.observe(layout.channeled(part, -1)) for part in x.split([10, 90])))
    np.testing.assert_allclose(moments.compute(host(state))["var"], x.numpy().var(0), rtol=1e-12)


def test_scalars_of_a_layer():
    x = draw(16, 5, 6, 6, mean=1)
    rows = channels(x, 1)
    _, state = observed(x, 1)
    (row,) = summarize("moments", [("m/output", "value")], [state], 1.0)
    found = dict(zip(row.stats, row.values, strict=True))
    rms = np.sqrt((rows**2).mean(0))
    expected = {
        "mean": rows.mean(),
        "var": rows.var(0).mean(),
        "rms": np.sqrt((rows**2).mean()),
        "rms.min": rms.min(),
        "rms.q50": np.median(rms),
        "rms.max": rms.max(),
        "mean.min": rows.mean(0).min(),
        "var.q50": np.median(rows.var(0)),
        "count": 576,
        "nonfinite": 0,
        "dead": 0,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert set(found) == {*expected, "mean.q50", "mean.max", "var.min", "var.max"}
    np.testing.assert_allclose(row.arrays["rms"], rms, rtol=1e-5)


def test_the_loss_scale_is_undone_in_gradients_alone():
    x = draw(16, 5)
    _, state = observed(x * 1024, -1)
    sites = [("m/output", "gradient"), ("m/output", "value")]
    gradient, value = (
        dict(zip(r.stats, r.values, strict=True)) for r in summarize("moments", sites, [state] * 2, 1024.0)
    )
    rows = channels(x, -1)
    assert gradient["rms"] == pytest.approx(np.sqrt((rows**2).mean()), rel=1e-5)
    assert gradient["var.max"] == pytest.approx(rows.var(0).max(), rel=1e-5)
    assert gradient["count"] == value["count"] == 16
    assert value["rms"] == pytest.approx(1024 * gradient["rms"])


def test_rows_come_back_in_the_order_given_though_widths_differ():
    states = [host(moments.observe(layout.channeled(draw(9, width, mean=width), -1))) for width in (3, 5, 3, 4, 5)]
    sites = [(f"m{i}/output", "value") for i in range(5)]
    rows = summarize("moments", sites, states, 1.0)
    assert [row.site for row in rows] == [site for site, _ in sites]
    assert [len(row.arrays["mean"]) for row in rows] == [3, 5, 3, 4, 5]
    for row, state in zip(rows, states, strict=True):
        np.testing.assert_allclose(row.arrays["mean"], state[1])
