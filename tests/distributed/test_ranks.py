"""Sums over ranks, and what becomes of them when the ranks do not agree or one is gone."""

import numpy as np

from tests.distributed import jobs
from tests.distributed.launch import launch


def test_two_ranks_exchange_and_one_leaves():
    found = launch(jobs.exchange, 2)
    for rank in range(2):
        before, summed, largest, alike, differing, none, *_ = found[rank]
        assert not before
        np.testing.assert_array_equal(summed[0], [1.0, 3.0, 5.0])
        np.testing.assert_array_equal(summed[1], np.full((2, 2), 3.0))
        np.testing.assert_array_equal(largest[0], [1.0, 0.0])
        assert (alike, differing, none) == (["a", "b"], ["a", "b"], [])
    *_, error, waited, alone = found[0]
    assert "Connection" in error
    assert waited < 5
    assert alone == 1.0


def test_ranks_that_do_not_attach_alike_are_alone():
    found = launch(jobs.refusals, 2)
    assert found[0] == ["rank 1 has not attached", "the ranks attach differently", True]
    assert found[1] == ["the ranks attach differently", True]


def test_shards_are_counted_once():
    found = launch(jobs.shards, 2)
    for rank in range(2):
        for got, expected in zip(*found[rank], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-14)
