"""Numbers and diagnostics of the user's own."""

import pytest
import torch
from torch import nn

import normscope as ns


def attached(**settings):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return model, optimizer, ns.attach(model, optimizer, every=2, **settings)


def train(model, optimizer, scope, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        scope.measured("1", mine=step, twice=torch.tensor(2.0 * step))
        loss.backward()
        optimizer.step()


def test_numbers_of_the_users_own_are_kept_at_sampled_steps_and_through_a_resume(tmp_path):
    for first in (0, 5):
        model, optimizer, scope = attached(run=tmp_path / "a", resume=True)
        with scope:
            train(model, optimizer, scope, 5, first)
        scope.measured("1", mine=99.0)  # closed: nothing
    record = ns.load(tmp_path / "a")
    assert record.series("1/mine", "twice").to_dict() == {0: 0, 2: 4, 4: 8, 6: 12, 8: 16}
    assert record.series("1/mine", "mine").to_dict() == {0: 0, 2: 2, 4: 4, 6: 6, 8: 8}
    assert record.series("1/output", "rms").index.tolist() == [0, 2, 4, 6, 8]
    assert (record.sites["site"] == "1/mine").sum() == 1
    assert ns.write_report(record, ns.diagnose(record), tmp_path / "report.html").exists()


@pytest.mark.parametrize("value", ["many", torch.ones(2), [1.0]])
def test_what_is_no_number_is_refused(value):
    _, _, scope = attached()
    with scope, pytest.raises(ns.ArgumentError, match=r"mine=.* must be a number or a tensor of one element"):
        scope.measured("1", mine=value)


def test_diagnostics_of_the_users_own_are_judged_with_the_others():
    model, optimizer, scope = attached()
    with scope:
        train(model, optimizer, scope, 6)

    def worst(record):
        return [ns.Finding(id="mine.worst", verdict=ns.Verdict.FAILURE, message=f"{record.names}")]

    def broken(record):
        raise ZeroDivisionError("mine")

    findings = ns.diagnose(scope.record(), also=iter([worst, broken]))
    assert findings[0].id == "mine.worst"
    (failed,) = [f for f in findings if "failed on this record" in f.message]
    assert (failed.id, failed.verdict) == ("test_measured.broken", ns.Verdict.UNDECIDED)
    assert len(findings) == len(ns.diagnose(scope.record())) + 2
