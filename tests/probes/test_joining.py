"""Joining the states of ranks, on a stand-in for the ranks, against the states of all samples at once."""

import numpy as np
import pytest
import torch

from normscope.probes import covariance, layout, moments, tails
from normscope.probes.joining import Item, joined
from tests.probes.ranks import Threads


def state_of(kind, x):
    """Return the state of samples [rows, features] on the host."""
    if kind == "moments":
        found = moments.observe(layout.channeled(x, -1))
        return np.stack((np.full(x.shape[1], float(found.n)), found.mean, found.var * found.n))
    if kind == "tails":
        return tails.observe(layout.channeled(x, -1)).numpy()
    return covariance.observe(x, -1).numpy()


CASES = [
    ("moments", (5, 9, 3), 4),
    ("tails", (5, 9, 3), 4),
    ("covariance", (3, 2, 4), 10),  # all kept as they are
    ("covariance", (7, 3, 6), 10),  # kept by each, too many together
    ("covariance", (20, 3, 30), 10),  # reduced by some
    ("covariance", (300, 200, 290), covariance.WIDEST + 6),  # kept, of a wide layer
    ("covariance", (600, 500, 10), covariance.WIDEST + 6),  # a sketch
]


@pytest.mark.parametrize(("kind", "rows", "width"), CASES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_joint_states_are_those_of_all_samples(kind, rows, width, offset):
    draw = torch.Generator().manual_seed(sum(rows))
    x = offset + torch.randn(sum(rows), width, generator=draw, dtype=torch.float64)
    parts = torch.split(x, rows)
    items = [[Item("a", kind, state_of(kind, part))] for part in parts]
    found = Threads(len(rows)).run(lambda ranks: joined(ranks, items[ranks.rank], 0))
    expected = state_of(kind, x if kind != "tails" else torch.cat(parts)[:32])
    for (state,), missing in found:
        assert missing == []
        assert state.shape == expected.shape
        np.testing.assert_allclose(state, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def test_of_a_constant_nothing_remains():
    x = torch.full((12, 3), 0.1, dtype=torch.float64)
    for kind in ("moments", "tails"):
        items = [[Item("a", kind, state_of(kind, part))] for part in torch.split(x, (5, 7))]
        ((state,), _), _ = Threads(2).run(lambda ranks, items=items: joined(ranks, items[ranks.rank], 0))
        name = {"moments": moments, "tails": tails}[kind].compute(state)
        assert np.isnan(name["kurtosis"]).all() if kind == "tails" else (name["var"] < 1e-30).all()


def test_what_is_not_finite_spoils_its_channel_alone():
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1, 2] = torch.inf
    items = [[Item("a", "moments", state_of("moments", part))] for part in torch.split(x, 4)]
    ((state,), _), _ = Threads(2).run(lambda ranks: joined(ranks, items[ranks.rank], 0))
    assert np.isfinite(state[:, :2]).all()
    assert not np.isfinite(state[1:, 2]).any()


def test_what_not_all_have_stays_as_it_was():
    ones = np.ones((2, 2))
    items = [[Item("a", "sum", ones), Item("b", "sum", ones)], [Item("b", "sum", ones), Item("a", "sum", np.ones(3))]]
    (first, missing), (second, others) = Threads(2).run(lambda ranks: joined(ranks, items[ranks.rank], 0))
    assert (missing, others) == ([0], [1])
    np.testing.assert_array_equal(first[0], ones)
    np.testing.assert_array_equal(first[1], 2 * ones)
    np.testing.assert_array_equal(second[0], 2 * ones)
    at = (0, 1)
    found = Threads(2).run(lambda ranks: joined(ranks, items[0], at[ranks.rank]))
    assert [missing for _, missing in found] == [[0, 1], [0, 1]]  # of different steps
