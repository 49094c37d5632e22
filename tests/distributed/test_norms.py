"""Normalization that mixes samples, whitening among it: synchronized over ranks or not; and held batches."""

import numpy as np
import pytest

from tests.distributed import jobs
from tests.distributed.launch import launch

NAMES = ("bn", "iterative")


@pytest.fixture(scope="module")
def found():
    return launch(jobs.norms, 2)


@pytest.mark.parametrize("name", NAMES)
def test_synchronized_layers_train_and_are_recorded_as_in_one_process(name, found, tmp_path):
    (values, *_), buffers = found[0][name, True]
    (expected, *_), expected_buffers = jobs.crossing(0, tmp_path, name, 1, False)
    for mine, its in zip(buffers, expected_buffers, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-12, atol=1e-14)
    kept = [k for k in expected if k[2] == "train" and k[1:] != ("0/bias", "train", "gradient", "cosine")]  # of zero
    assert len(kept) > 1300
    np.testing.assert_allclose([values[k] for k in kept], [expected[k] for k in kept], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_layers_taken_apart_are_those_of_the_first_rank_and_their_outputs_those_of_all(name, found):
    (values, *_), _ = found[0][name, False]
    assert values[3, "1/input", "train", "value", "batch"] == 12
    assert values[3, "1/output", "train", "value", "count"] == 24
    if name == "bn":
        assert values[3, "1/input", "train", "value", "count"] == 12


@pytest.mark.parametrize("name", NAMES)
def test_held_batches_are_run_on_the_first_rank_where_no_other_is_needed(name, found):
    (values, _, _, messages), _ = found[0][name, False]
    assert {phase for _, _, phase, *_ in values} == {"train", "batch", "population", "noise", "flight"}
    assert messages == []
    assert found[1][name, False][0][0] == {}


def test_held_batches_that_need_every_rank_are_left_out_with_the_reason(found):
    said = "problem is not used, as {}: a forward pass needs every rank. Left out: noise, population"
    assert found[0]["bn", True][0][3] == [said.format("normalization layers are synchronized")]
    assert found[0]["held"][3] == [said.format("parameters are sharded")]
    assert found[0]["fsdp"] == []
    assert found[0]["bn", True][0][0][1, "/input", "train", "value", "seen"] == 24  # batches are seen all the same
