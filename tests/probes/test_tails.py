"""Tails against numpy and scipy on the same positions."""

import numpy as np
import pytest
import torch
from scipy import stats

from normscope.probes import layout, tails
from normscope.probes.summary import summarize


def draw(*shape, mean=0.0, dtype=torch.float32):
    return (mean + torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)


def positions(count):
    """Return where the subsample looks, worked out anew: the golden ratio's multiples, modulo 1."""
    if count <= tails.SAMPLES:
        return np.arange(count)
    ratio = (np.sqrt(5) - 1) / 2
    return np.unique(np.floor(((np.arange(tails.SAMPLES) + 0.5) * ratio % 1) * count).astype(int))


def sampled(x, axis):
    """Return the sampled values as float64 [n, channels]; positions count over samples first, then places."""
    rows = x.double().movedim(axis, -1).reshape(-1, x.shape[axis]).numpy()
    return rows[positions(len(rows))]


@pytest.mark.parametrize(
    ("x", "axis"),
    [
        (draw(6, 5, 4, 4), 1),
        (draw(8, 5, 30, 30), 1),
        (draw(8, 5, 30, 30).to(memory_format=torch.channels_last), 1),
        (draw(tails.SAMPLES, 5), -1),
        (draw(tails.SAMPLES + 1, 5), -1),
        (draw(7, 500, 5, mean=3), -1),
        (draw(8, 5, 40).bfloat16(), 1),
        (draw(8, 5, 40, mean=1e5, dtype=torch.float64), 1),
        (draw(5, 9, 9).relu().reshape(5, 81).T, -1),
    ],
    ids=["few", "NCHW", "channels last", "all rows", "one row more", "BTC", "bf16", "far mean", "zeros"],
)
def test_statistics_are_those_of_the_positions(x, axis):
    state = tails.observe(layout.channeled(x, axis)).double().numpy()
    found, values = tails.compute(state), sampled(x, axis)
    assert (state[0] == len(values)).all()
    np.testing.assert_array_equal(found["max"], np.abs(values).max(0))
    np.testing.assert_allclose(found["zeros"], (values == 0).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["kurtosis"], stats.kurtosis(values, 0, fisher=False), rtol=1e-6)
    assert np.isnan(found["saturated"]).all()


@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
def test_kurtosis_survives_a_far_mean(mean):
    x = draw(tails.SAMPLES, 4, mean=mean)
    found = tails.compute(tails.observe(layout.channeled(x, -1)).numpy())["kurtosis"]
    np.testing.assert_allclose(found, stats.kurtosis(x.double().numpy(), 0, fisher=False), rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1000.1, -1e-30])
def test_a_constant_channel_has_no_kurtosis(value):
    found = tails.compute(tails.observe(layout.channeled(torch.full((20, 2), value), -1)).numpy())
    assert np.isnan(found["kurtosis"]).all()
    assert found["zeros"].tolist() == [float(value == 0)] * 2


def test_saturation():
    x = torch.tensor([-1, -0.985, -0.975, 0, 0.975, 0.985, 1])[:, None].repeat(1, 2)  # the edges are 1 % of the range
    x[:, 1] = 0.0
    state = tails.observe(layout.channeled(x, -1), (-1.0, 1.0)).numpy()
    assert tails.compute(state)["saturated"].tolist() == [pytest.approx(4 / 7), 0]
    bounded, free = (
        summarize("tails", [("m/output", "value")], [s], 1.0)[0]
        for s in (state, tails.observe(layout.channeled(x, -1)).numpy())
    )
    assert dict(zip(bounded.stats, bounded.values, strict=True))["saturated"] == pytest.approx(2 / 7)
    assert "saturated" not in free.stats
    assert dict(zip(free.stats, free.values, strict=True))["sample_n"] == 7


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_value_spoils_its_channel_only(bad):
    x = draw(tails.SAMPLES, 3)
    x[7, 1] = bad
    found = tails.compute(tails.observe(layout.channeled(x, -1)).numpy())
    assert not np.isfinite(found["max"][1])
    assert np.isnan(found["kurtosis"][1])
    reference = stats.kurtosis(x[:, [0, 2]].double().numpy(), 0, fisher=False)
    np.testing.assert_allclose(found["kurtosis"][[0, 2]], reference, rtol=1e-6)
    (row,) = summarize("tails", [("m/output", "value")], [tails.observe(layout.channeled(x, -1)).numpy()], 1.0)
    assert dict(zip(row.stats, row.values, strict=True))["kurtosis"] == pytest.approx(reference.mean())


def test_merge_is_associative_and_equals_one_pass():
    x = draw(90, 4, mean=50, dtype=torch.float64)
    x[3, 0] = x[80, 0] = 0.0
    a, b, c = (tails.reduce(part, (-60.0, 60.0)) for part in x.split([10, 30, 50]))
    whole = tails.reduce(x, (-60.0, 60.0))
    left = tails.merge(tails.merge(a, b), c)
    for other in (tails.merge(a, tails.merge(b, c)), tails.merge(tails.merge(c, a), b), whole):
        torch.testing.assert_close(left, other, rtol=1e-9, atol=1e-7)


def test_the_subsample_is_the_same_at_every_step_and_touches_no_random_state():
    x = draw(64, 3, 20, 20)
    before = torch.get_rng_state()
    one, two = (tails.subsample(layout.channeled(x, 1)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(before, torch.get_rng_state())
    assert len(one) == tails.SAMPLES
    seen = torch.arange(16.0)[:, None, None, None].expand(16, 3, 20, 20)
    assert len(tails.subsample(layout.channeled(seen, 1))[:, 0].unique()) == 16  # every sample is seen


def test_subsamples_side_by_side_reduce_as_each_by_itself():
    parts = [draw(tails.SAMPLES, width, mean=width) for width in (1, 3, 7)]
    joined = tails.reduce(torch.cat(parts, 1)).split([1, 3, 7], 1)
    for part, state in zip(parts, joined, strict=True):
        torch.testing.assert_close(state, tails.reduce(part), rtol=1e-6, atol=1e-4)  # float32 sums, in another order


def test_a_subsample_is_a_copy():
    x = torch.ones(tails.SAMPLES, 3)
    kept = tails.subsample(layout.channeled(x, -1))
    x.zero_()
    assert bool((kept == 1).all())
