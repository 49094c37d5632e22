"""The models of other people: their norms are found, training is bit-identical, nothing fails."""

from collections import Counter

import pytest
import torch

import normscope as ns
from normscope.norms import find_norms
from tests import checks
from tests.architectures.table import ARCHITECTURES
from tests.awkward.base import Job

BY_NAME = {row.name: row for row in ARCHITECTURES}
STEPS = 3

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:DeprecationWarning",
)


@pytest.fixture(params=BY_NAME)
def row(request):
    checks.seed()
    return BY_NAME[request.param]


def failed(record):
    return list(record.events.loc[record.events["kind"] == "probe-failed", "message"])


def job(row):
    """Return a training run on inputs drawn at every step, and the list that its losses go to."""
    model, losses = row.build(), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def step():
        optimizer.zero_grad()
        loss = row.loss(model(**row.inputs()))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    return Job(model, (optimizer,), step), losses


def train(row, watched):
    """Train; return every bit of what is left, with the losses and the hooks, and the record."""
    checks.seed()
    run, losses = job(row)
    scope = ns.attach(run.model, run.optimizers, every=1) if watched else None
    for _ in range(STEPS):
        run.step()
    if scope is not None:
        scope.close()
    return checks.state_of(run) | checks.hook_counts(run) | {"losses": losses}, scope and scope.record()


def test_the_norms_are_those_of_the_definition(row):
    assert Counter(parts.kind for parts in find_norms(row.build()).values()) == row.norms


def test_training_is_bit_identical(row):
    plain, _ = train(row, watched=False)
    seen, record = train(row, watched=True)
    assert [name for name in plain | seen if plain.get(name, 0) != seen.get(name, 0)] == []
    assert failed(record) == []
    assert len(record.steps) == STEPS


def test_a_look_leaves_the_model_as_it_is(row):
    run, _ = job(row)
    run.step()
    batches = [(row.inputs(), None) for _ in range(2)]
    before = checks.state_of(run)
    record = ns.examine(
        run.model,
        lambda output, _: row.loss(output),
        batches,
        forward=lambda model, batch: (model(**batch[0]), None),
        progress=False,
    )
    ns.diagnose(record)
    ns.lint(run.model, run.optimizers, batches[0][0])
    after = checks.state_of(run)
    assert [name for name in before | after if before.get(name, 0) != after.get(name, 0)] == []
    assert failed(record) == []
