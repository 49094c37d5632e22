"""Thinning keeps what is extreme."""

import numpy as np
import pytest

from normscope.report.thin import edges, extremes, paired


@pytest.mark.parametrize(("n", "buckets"), [(5, 2), (600, 600), (601, 600), (7, 100), (1, 3)])
def test_buckets_cover_everything_and_differ_by_one(n, buckets):
    starts = edges(n, buckets)
    sizes = np.diff([*starts, n])
    assert starts[0] == 0
    assert len(starts) == min(n, buckets)
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1


def test_a_curve_keeps_its_ends_and_the_extremes_of_each_bucket():
    values = np.random.default_rng(0).normal(size=5000)
    values[[1234, 4321]] = 50, -50
    values[100:200] = np.nan
    kept = extremes(values, 240)
    assert {0, 1234, 4321, 4999} <= set(kept.tolist())
    assert len(kept) <= 242
    assert (np.diff(kept) > 0).all()
    for start, end in zip(edges(5000, 120), [*edges(5000, 120)[1:], 5000], strict=True):
        part = values[start:end]
        if np.isfinite(part).any():
            inside = values[kept[(kept >= start) & (kept < end)]]
            assert np.nanmax(inside) == np.nanmax(part)
            assert np.nanmin(inside) == np.nanmin(part)


def test_a_short_curve_is_kept_whole():
    assert extremes(np.arange(10.0), 10).tolist() == list(range(10))


def test_pairs_of_columns_are_the_extremes_of_their_bucket_in_the_order_of_time():
    values = np.random.default_rng(1).normal(size=(4, 1000)).astype(np.float32)
    values[2, 10:500] = np.nan
    values[3, 700] = np.inf
    thin = paired(values, 100)
    starts = edges(1000, 50)
    assert thin.shape == (4, 100)
    for row in range(4):
        for i, (start, end) in enumerate(zip(starts, [*starts[1:], 1000], strict=True)):
            part = values[row, start:end]
            pair = thin[row, 2 * i : 2 * i + 2]
            if np.isnan(part).all():
                assert np.isnan(pair).all()
            else:
                assert (np.nanmin(part), np.nanmax(part)) == (pair.min(), pair.max())
    rising = paired(np.arange(40.0)[None], 4)
    assert rising.tolist() == [[0, 19, 20, 39]]
    assert paired(-np.arange(40.0)[None], 4).tolist() == [[0, -19, -20, -39]]
