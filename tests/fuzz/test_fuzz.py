"""The laws of attach, examine, convert and fold on models drawn at random."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import normscope as ns
from normscope.core.errors import ArgumentError
from tests import checks
from tests.architectures.architecture import squares
from tests.awkward.base import Job
from tests.fuzz.models import CASTS, LAYERS, OPTIMIZERS, WRAPPERS, ZOO, C, Plan, make, plans

EXAMPLES = int(os.environ.get("NORMSCOPE_FUZZ", "40"))
STEPS = 3
OWN = (RuntimeError, ValueError, IndexError, NotImplementedError)  # what a model itself may raise; ArgumentError is one
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about what the model itself does


def law(examples: int):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize="NORMSCOPE_FUZZ" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def job(plan: Plan) -> Job:
    """Return the training run of a plan, on inputs drawn at every step."""
    model = make(plan)
    optimizer = OPTIMIZERS[plan.optimizer]([p for p in model.parameters() if p.requires_grad])
    dtype = torch.float64 if plan.double else torch.float32

    def step() -> None:
        optimizer.zero_grad()
        squares(model(torch.randn(plan.shape, dtype=dtype))).backward()
        optimizer.step()

    return Job(model, (optimizer,), step)


def train(plan: Plan, every: int | None, run: Path | None = None) -> tuple[dict[str, object], ns.Scope | None]:
    """Train, watched if `every` is given; return every bit of what is left, with the error of the model's own."""
    checks.seed()
    run_of = job(plan)
    before = checks.hook_counts(run_of)
    scope = None if every is None else ns.attach(run_of.model, run_of.optimizers, every=every, run=run)
    error = ""
    try:
        for _ in range(STEPS):
            run_of.step()
    except OWN as raised:  # as of one value a channel
        error = f"{type(raised).__name__}: {raised}"
    finally:
        if scope is not None:
            scope.close()
    added = checks.hooks_added(before, checks.hook_counts(run_of))
    return checks.state_of(run_of) | {"error": error, "hooks added": added}, scope


def differing(one: dict[str, object], other: dict[str, object]) -> list[str]:
    return [name for name in one | other if one.get(name, 0) != other.get(name, 0)]


def own_errors(model: torch.nn.Module, inputs: list[torch.Tensor]) -> None:
    """Let a model raise what it would in a look: every part in training mode."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        module.training = True
    for x in inputs:
        squares(copied(x)).backward()


def failed(record: ns.Record) -> list[str]:
    return list(record.events.loc[record.events["kind"] == "probe-failed", "message"])


@law(EXAMPLES)
@given(plans(), st.sampled_from([1, 2]))
def test_attach_leaves_training_alone(plan: Plan, every: int) -> None:
    plain, _ = train(plan, None)
    watched, scope = train(plan, every)
    assert differing(plain, watched) == []
    assert failed(scope.record()) == []


@law(max(EXAMPLES // 8, 3))
@given(plans())
def test_a_record_loads_and_a_report_is_written(plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _, scope = train(plan, 1, Path(folder, "run"))
        record = ns.load(Path(folder, "run"))
        assert set(record.sites["site"]) == set(scope.record().sites["site"])
        assert scope.findings() == ns.diagnose(record)
        assert scope.report().stat().st_size > 10_000


@law(EXAMPLES // 2)
@given(plans())
def test_examine_leaves_a_model_alone(plan: Plan) -> None:
    checks.seed()
    run = job(plan)
    dtype = torch.float64 if plan.double else torch.float32
    batches = [(torch.randn(plan.shape, dtype=dtype), None) for _ in range(2)]
    try:
        run.step()
        own_errors(run.model, [x for x, _ in batches])
    except OWN:
        assume(False)
    before = checks.state_of(run)
    record = ns.examine(run.model, lambda output, _: squares(output), batches, progress=False)
    assert differing(before, checks.state_of(run)) == []
    assert failed(record) == []
    assert isinstance(ns.diagnose(record), list)
    ns.lint(run.model, run.optimizers, batches[0][0])
    assert differing(before, checks.state_of(run)) == []


@law(EXAMPLES)
@given(plans(), st.sampled_from(ZOO))
def test_convert_keeps_shapes_and_types(plan: Plan, to: str) -> None:
    checks.seed()
    traits = getattr(ns.norms.build(to, C), "traits", None)
    assume(traits is None or len(plan.shape) in traits.ranks)
    assume("half" not in plan.names())  # some methods take no weights in half precision
    model = make(plan)
    x = torch.randn(plan.shape, dtype=torch.float64 if plan.double else torch.float32)
    others = {name: p for name, p in model.named_parameters() if not in_norm(model, name)}
    types = {t.dtype for t in model.state_dict().values()}
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        shape = leading(copy.deepcopy(model)(x)).shape
        ns.norms.convert(model, to=to, groups=2)
    except OWN:
        assume(False)
    now = dict(model.named_parameters())
    assert all(now[name] is p for name, p in others.items())
    assert {p.dtype for p in now.values()} <= types
    assert all(module.training == modes[name] for name, module in model.named_modules() if name in modes)
    try:
        output = leading(model(x))
    except ArgumentError:  # of a method that takes no input of this rank or size
        return
    assert output.shape == shape


FOLDED = tuple(name for name in WRAPPERS if name not in CASTS)
STORED = ("batch", "decorrelated-batch", "iterative", "whitening-coloring", "mean-only-batch", "l1-batch")


@law(EXAMPLES)
@given(plans((*LAYERS, *STORED, "batch", "linear", "grouped", "transposed"), FOLDED))
def test_a_folded_model_computes_the_same(plan: Plan) -> None:
    checks.seed()
    run = job(plan)
    dtype, tolerance = (torch.float64, 1e-9) if plan.double else (torch.float32, 1e-5)
    x = torch.randn(plan.shape, dtype=dtype)
    try:
        for _ in range(STEPS):
            run.step()
        expected = leading(run.model.eval()(x))
    except OWN:
        assume(False)
    before = checks.state_of(run)
    found = leading(ns.norms.fold(run.model)(x))
    assert differing(before, checks.state_of(run)) == []
    assume(bool(expected.isfinite().all()))
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max().clamp(min=1.0))


def leading(output: object) -> torch.Tensor:
    """Return the first tensor of an output."""
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def in_norm(model: torch.nn.Module, name: str) -> bool:
    return any(not path or name.startswith(f"{path}.") for path in ns.norms.find_norms(model))
