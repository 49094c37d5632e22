"""Ranks that do not do the same, and ranks that are lost: the others go on, and the record stays readable."""

import numpy as np
import pytest

import normscope as ns
from tests.distributed import jobs
from tests.distributed.launch import launch

SOON = 5.0  # seconds; an exchange would wait for a minute
DIFFERED = "the ranks measured different things at step {}, as {}: what not all have is recorded as rank 0 has it"


@pytest.fixture(scope="module")
def found():
    return launch(jobs.unlike, 2)


def test_a_branch_that_one_rank_leaves_out_is_that_of_the_first_rank(found):
    values, _, context, messages = found[0]["branch"]
    assert messages == [DIFFERED.format(2, "side/output value moments")]
    counts = {(step, module): values[step, f"{module}/output", "train", "value", "count"] for step, module in AT}
    assert counts == {(0, "wide"): 12, (0, "side"): 12, (2, "wide"): 12, (2, "side"): 6, (4, "side"): 12}
    assert context[:, 1].tolist() == [12] * 5


AT = ((0, "wide"), (0, "side"), (2, "wide"), (2, "side"), (4, "side"))


def test_a_probe_that_fails_on_one_rank_stops_nothing(found):
    (values, _, _, messages), alike, seconds = found[0]["failing"]
    assert alike
    assert found[1]["failing"][1]
    assert seconds < SOON
    assert messages == [DIFFERED.format(0, "conv/output value moments")]
    assert values[4, "wide/output", "train", "value", "count"] == 6  # of the first rank
    assert values[4, "wide/output", "train", "value", "sample_n"] == 12


def test_unequal_batches_are_joined(found):
    values, _, context, messages = found[0]["uneven"]
    assert (context[0, 1], messages) == (12, [])
    assert values[0, "wide/output", "train", "value", "count"] == 12
    assert values[0, "wide/input", "train", "value", "samples"] == 12


def test_of_one_attached_rank_its_own_share_is_recorded(found):
    (values, _, context, messages), seconds, _ = found[0]["first_alone"]
    assert seconds < SOON
    assert messages == ["from step 0 on rank 0 of 2 measures alone: rank 1 has not attached"]
    assert values[0, "wide/output", "train", "value", "count"] == 6
    assert context[:, 1].tolist() == [12] * 5


def test_one_rank_may_look_at_the_record(found):
    assert found[0]["first_alone"][2] == [3]  # steps 0 to 2


def test_a_run_goes_on(found):
    values, _, context, messages = found[0]["resumed"]
    assert context[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert context[:, 1].tolist() == [12] * 6
    assert messages == ["resumed: recorded before are 3 steps"]
    assert {step for step, _, phase, *_ in values if phase != "flight"} == {0, 2, 4}
    assert values[4, "wide/output", "train", "value", "count"] == 12


def test_the_first_rank_judges_and_reports(found):
    judged, page, written = found[0]["said"]
    assert judged > 0
    assert (page, written) == ("page.html", 1)
    assert found[1]["said"] == (0, "page.html", 0)


def test_two_models_are_kept_apart_and_only_sampled_steps_exchange_anything(found):
    for rank in range(2):
        counts, first, second = found[rank]["two_models"]
        assert counts == [0, 8, 0, 0, 8, 0, 4]  # of each model: what all have, two sums and the maxima; at the end two
        assert first[3] == second[3] == []
        if rank == 0:
            assert first[2][:, 1].tolist() == second[2][:, 1].tolist() == [12] * 5


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(("who", "how"), [(0, "raise"), (1, "raise"), (0, "kill"), (1, "kill")])
def test_a_run_in_which_a_rank_ends_is_readable(kind, who, how, tmp_path):
    ended = launch(jobs.broken, 2, kind, who, how, str(tmp_path / "run"), dying=(who,) if how == "kill" else ())
    for rank, (error, seconds, _) in ended.items():
        assert error == ("ValueError" if rank == who else "RuntimeError")
        assert seconds < SOON
    record = ns.load(tmp_path / "run")
    assert record.context["step"].tolist() == [0, 1, 2]
    assert record.context["batch_size"].tolist() == [12, 12, 12]
    assert np.isfinite(record.context["grad_norm"].astype(float)).all()
    assert record.series("wide/output", "count").tolist() == [12, 12]


@pytest.mark.parametrize(("kind", "how"), [("ddp", "kill"), ("fsdp", "late")])
def test_the_end_of_a_run_does_not_wait_for_a_rank_that_is_gone(kind, how):
    ended = launch(jobs.last, 2, kind, how, dying=(1,) if how == "kill" else ())
    (_, _, context, messages), seconds = ended[0]
    assert seconds < SOON
    assert [said.partition(": ")[0] for said in messages] == ["from step 4 on rank 0 of 2 measures alone"]
    assert "/" not in messages[0]
    assert context[:, 1].tolist() == [12, 12, 12, 12]
    assert np.isfinite(context[:3]).all()
    assert np.isnan(context[3, 3]) == (kind == "fsdp")  # of a shard alone no norm is known
