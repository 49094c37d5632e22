"""Several ranks against one process on the joined batch."""

import numpy as np
import pytest

from tests.distributed import jobs
from tests.distributed.launch import launch

SAMPLED = ("max", "zeros", "kurtosis", "sample_n")  # of 32 values a channel in each process, more than one has
AREAS = ("group/input", "layer/input")  # their batch is that of a forward pass


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    scope, _ = jobs.train(0, tmp_path_factory.mktemp("single"), "one", 1)
    return jobs.recorded(scope)


@pytest.fixture(
    scope="module", params=[("ddp", 2), ("fsdp", 2), ("ddp", 4), ("fsdp", 4)], ids=lambda p: "-".join(map(str, p))
)
def several(request):
    kind, size = request.param
    return launch(jobs.both, size, kind, size)


def is_exact(key):
    _, site, _, _, stat = key
    if stat.startswith(("peak", "middle")):  # of the largest tokens, which are the first rank's
        return False
    if site in AREAS:
        return stat != "batch"
    return site.split("/")[0] not in ("conv", "group") or stat.split(".")[0] not in SAMPLED


def test_training_is_bit_identical_and_one_rank_writes(several):
    for rank, (alike, recorded, files, said) in several.items():
        assert alike
        assert files == ["record.sqlite"]
        assert bool(recorded[0]) == (rank == 0)
        assert said.startswith(f"Scope(Net, 8 modules, 2 norms, rank {rank} of {len(several)}, closed, step 5, every 2")


def test_what_is_recorded_is_that_of_one_process(several, single):
    values, arrays, context, messages = several[0][1]
    expected, expected_arrays, expected_context, _ = single
    assert messages == []
    np.testing.assert_allclose(context, expected_context, rtol=1e-6)  # steps, batch sizes, losses, gradient norms
    assert values.keys() == expected.keys()
    exact = list(filter(is_exact, expected))
    assert len(exact) > 1000
    np.testing.assert_allclose([values[k] for k in exact], [expected[k] for k in exact], rtol=1e-5, atol=1e-9)
    assert arrays.keys() == expected_arrays.keys()
    for key in filter(is_exact, expected_arrays):
        order = np.sort if key[1] in AREAS else np.asarray  # areas come rank by rank
        mine, its = order(arrays[key]), order(expected_arrays[key])
        scale = np.nanmax(np.abs(its), initial=0)
        np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-6 * scale, err_msg=str(key))
