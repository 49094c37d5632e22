"""What Problem refuses, and what it leaves as it was."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normscope as ns
from normscope.core.errors import ArgumentError
from normscope.linalg.operator import Operator
from normscope.linalg.problem import drops
from tests.checks import bits
from tests.linalg.models import make, mlp, quadratic

LOSS = F.cross_entropy
MODEL, BATCH = make("layer")


def problem(**options):
    return ns.Problem(MODEL, LOSS, [BATCH], **options)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.scale = nn.Linear(6, 3), 0.01

    def forward(self, x):
        return self.inside(x + self.scale * torch.randn_like(x))


class NoSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()


class Once(nn.Linear):
    def forward(self, x):
        return NoSecond.apply(super().forward(x))


def frozen():
    model = copy.deepcopy(MODEL)
    model[0].requires_grad_(False)
    return model


def loader():
    data = torch.utils.data.TensorDataset(*BATCH)
    return torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)


NAN = (torch.full((8, 6), float("nan"), dtype=torch.float64), BATCH[1])
V = torch.zeros(51, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: problem(mode="test"), r"mode='test' is unknown; .*Options: train, eval"),
        (lambda: problem(reduction="none"), r"reduction='none' is unknown; Options: mean, sum"),
        (lambda: problem(dtype=torch.float16), "dtype=torch.float16 must be torch.float32, torch.float64 or None"),
        (lambda: problem(parameters="layer3.*"), r"parameters='layer3\.\*' is unknown; .*0\.weight"),
        (
            lambda: ns.Problem(frozen(), LOSS, [BATCH], parameters="0.*"),
            "It matches frozen parameters only",
        ),
        (lambda: problem(held=0), "held=0 must be a number of batches, at least 1"),
        (lambda: ns.Problem(MODEL, LOSS, iter([BATCH]), held=None), "a list_iterator gives its batches only once"),
        (lambda: ns.Problem(MODEL, LOSS, BATCH), r"got a single batch; pass a list of batches, as \[\(inputs"),
        (lambda: ns.Problem(nn.ReLU(), LOSS, [BATCH]).size, "model=ReLU has no trainable parameters"),
        (lambda: ns.Problem(nn.LazyLinear(3), LOSS, [BATCH]).size, "weight, bias have no shape yet; run the model"),
        (lambda: ns.Problem(MODEL, lambda o, t: 1.0, [BATCH]).size, "loss returned a float; it must return a scalar"),
        (
            lambda: ns.Problem(MODEL, lambda o, t: o, [BATCH]).size,
            r"loss returned a tensor of shape \(8, 3\); it must return a scalar: join the samples by \.mean",
        ),
        (lambda: ns.Problem(MODEL, LOSS, [BATCH, NAN]).size, "loss is nan in batch 1: curvature is not defined there"),
        (
            lambda: ns.Problem(MODEL, lambda o, t: o.detach().sum(), [BATCH]).size,
            "loss does not depend on any of the 6 selected parameters",
        ),
        (
            lambda: ns.Problem(Noisy().double(), LOSS, [BATCH]).size,
            r"two evaluations at the same parameters differ: the gradient by .* Hold the batches in a list",
        ),
        (
            lambda: ns.Problem(mlp(nn.BatchNorm1d(4)).double(), LOSS, loader(), held=None).size,
            "shuffling in the loader",
        ),
        (lambda: problem().operator("hesian"), "operator='hesian' is unknown; did you mean 'hessian'"),
        (lambda: problem().operator("mc-fisher", draws=0), "draws=0 must be a number of targets"),
        (lambda: problem().operator().block("9.*"), r"parameters='9\.\*' is unknown"),
        (lambda: problem().hvp(V[:5]), r"vector: got shape \[5\]; it must be a tensor \[51\]"),
        (lambda: problem().hvp([1.0]), r"vector: got list; it must be a tensor \[51\]"),
        (lambda: problem().operator().matmat(V), r"vector: got shape \[51\]; it must be a tensor \[51, k\]"),
        (lambda: problem().hvp(V.float()), "vector: got torch.float32 on cpu; it must be torch.float64 on cpu"),
        (
            lambda: ns.Problem(Once(6, 3).double(), LOSS, [BATCH]).hvp(torch.ones(21).double()),
            "an operation has no second derivative .* eager attention",
        ),
        (
            lambda: ns.Problem(MODEL, lambda o, t: o, [BATCH], forward=lambda m, b: (LOSS(m(b[0]), b[1]), 0)).operator(
                "ggn"
            ),
            "operator='ggn' needs the model's output, one row for each sample",
        ),
        (
            lambda: ns.Problem(MODEL, lambda o, t: LOSS(o, t), [BATCH]).operator("mc-fisher"),
            "operator='mc-fisher' draws targets .* must be torch.nn.functional.cross_entropy",
        ),
        (lambda: ns.eigenpairs(problem(), which="LR"), "which='LR' is unknown; .*Options: LA, SA, LM"),
        (lambda: ns.eigenpairs(problem(), tol=0), "tol=0 must be positive"),
        (lambda: ns.eigenpairs(problem(), k=0), "k=0 must be a whole number, at least 1"),
        (lambda: ns.eigenpairs(problem(), k=52), "k=52 exceeds the number of parameters, 51"),
        (lambda: ns.eigenpairs(problem(), k=5, max_matvecs=4), "max_matvecs=4 must be a whole number, at least 5"),
        (lambda: ns.eigenpairs(problem(), k=5, max_basis=11), "max_basis=11 must be a whole number, at least 12"),
        (lambda: ns.eigenpairs(problem(), engine="scipy"), "engine='scipy' is unknown"),
        (lambda: ns.eigenpairs(problem(), engine="pyhessian"), "which='LA': engine='pyhessian' finds the largest by"),
        (
            lambda: ns.eigenpairs(problem(), which="LM", operator="ggn", engine="pyhessian"),
            "engine='pyhessian' works for operator='hessian', a mean loss",
        ),
        (lambda: ns.eigenpairs(MODEL), "problem=Sequential must be normscope.Problem"),
        (lambda: ns.spectrum(problem(), method="kpm"), "method='kpm' is unknown; .*Options: auto, slq, exact"),
        (lambda: ns.spectrum(problem(), steps=1), "steps=1 must be a whole number, at least 2"),
        (lambda: ns.spectrum(problem(), steps=40, max_matvecs=30), "max_matvecs=30 must be .* at least 40"),
        (lambda: ns.spectrum(problem()).density(variance=0.0), "variance=0.0 must be positive"),
        (lambda: ns.trace(problem(), method="hutch"), r"method='hutch' is unknown; did you mean 'hutch\+\+'"),
        (lambda: ns.trace(problem(), n=1), "n=1 must be a whole number, at least 2. method='hutchinson' needs"),
        (lambda: ns.trace(problem(), method="xtrace", engine="pyhessian"), "engine='pyhessian' has 'hutchinson' alone"),
        (lambda: ns.trace(quadratic([1.0] * 2001)[0], method="exact"), "forms a matrix of 2,001 parameters"),
        (lambda: ns.diagonal(problem(), n=True), "n=True must be a whole number, at least 2"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_a_loader_that_turns_empty():
    class Once:
        def __init__(self):
            self.rest = [BATCH, BATCH]

        def __iter__(self):
            rest, self.rest = self.rest, []
            return iter(rest)

    with pytest.raises(ArgumentError, match="batches: Once gave no batch; pass a loader that can be read again"):
        ns.Problem(MODEL, LOSS, Once(), held=None).hvp(V)


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_makes_operators_stale(count):
    model = copy.deepcopy(MODEL)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    held = ns.Problem(model, LOSS, [BATCH] * count)
    v = torch.ones(51, dtype=torch.float64)
    before, operator = held.hvp(v), held.operator("ggn")
    LOSS(model(BATCH[0]), BATCH[1]).backward()
    optimizer.step()
    for call in (held.hvp, operator.matvec, operator.linear_operator().matvec):
        with pytest.raises(ArgumentError, match=r"the operator is stale: 0\.weight, .* and 3 more changed since"):
            call(v)
    held.refresh()
    assert not torch.equal(held.hvp(v), before)
    assert isinstance(held.operator(), Operator)


# ---- harmlessness ----------------------------------------------------------------------------------------------------


def everything(model):
    state = {f"tensor {n}": bits(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    state |= {f"gradient {n}": None if p.grad is None else bits(p.grad) for n, p in model.named_parameters()}
    state |= {f"requires {n}": p.requires_grad for n, p in model.named_parameters()}
    state |= {f"version {n}": b._version for n, b in model.named_parameters()}
    state |= {f"identity {n}": id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    state |= {f"mode {n}": m.training for n, m in model.named_modules()}
    state["random"] = bits(torch.get_rng_state()), tuple(np.random.get_state()[1]), random.getstate()
    return state


@pytest.mark.parametrize("name", ["batch, in place", "instance", "iterative", "decorrelated-batch", "attention"])
@pytest.mark.parametrize("broken", [False, True])
def test_nothing_of_the_users_changes(name, broken):
    model, batch = make(name)
    LOSS(model(batch[0]), batch[1]).backward()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    calls = [0]

    def loss(output, target):
        calls[0] += 1
        torch.rand(1), random.random(), np.random.rand()
        if broken and calls[0] == 7:
            raise ZeroDivisionError
        return LOSS(output, target)

    before = everything(model)
    held = ns.Problem(model, loss, [(batch[0][:4], batch[1][:4]), (batch[0][4:], batch[1][4:])], mode="train")

    def use():
        held.hvp(torch.ones(held.size, dtype=torch.float64))
        single = ns.Problem(model, LOSS, [batch])
        ns.eigenpairs(single, 2, max_matvecs=8)
        ns.eigenpairs(single, 1, "LM", engine="pyhessian")
        ns.spectrum(single, method="slq", steps=4, probes=1)
        ns.trace(single, 4, operator="ggn")
        ns.trace(single, 4, engine="pyhessian")
        ns.trace(single, 6, "hutch++", operator="mc-fisher", seed=1) if loss is LOSS else ns.diagonal(single, 2)
        ns.layerwise(single, 2, max_matvecs=3)

    if broken:
        with pytest.raises(ZeroDivisionError):
            use()
    else:
        use()
    assert everything(model) == before


def test_a_hook_on_a_parameter_does_not_change_the_curvature():
    model = copy.deepcopy(MODEL)
    expected = ns.Problem(model, LOSS, [BATCH]).hvp(torch.ones_like(V))
    seen = []
    handle = model[0].weight.register_hook(lambda g: seen.append(1) or g * 0)
    torch.testing.assert_close(ns.Problem(model, LOSS, [BATCH]).hvp(torch.ones_like(V)), expected, rtol=0, atol=0)
    assert not seen
    LOSS(model(BATCH[0]), BATCH[1]).backward()
    assert seen
    assert not model[0].weight.grad.any()
    handle.remove()


def test_an_attached_scope_does_not_hear_curvature():
    def run(measures):
        torch.manual_seed(0)
        model = mlp(nn.BatchNorm1d(4)).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        held = ns.Problem(model, LOSS, [BATCH])
        with ns.attach(model, optimizer, every=1) as scope:
            for _ in range(3):
                optimizer.zero_grad()
                loss = LOSS(model(BATCH[0]), BATCH[1])
                if measures:
                    ns.eigenpairs(held, 2, max_matvecs=6)
                    ns.trace(held, 2)
                loss.backward()
                if measures:
                    ns.spectrum(held, method="slq", steps=3, probes=1)
                optimizer.step()
        return scope.record()

    plain, measured = run(False).frame(), run(True).frame()
    assert plain.drop(columns="run").equals(measured.drop(columns="run"))
    assert len(plain)


def test_under_no_grad_and_inference_mode():
    expected = problem().hvp(torch.ones_like(V))
    with torch.no_grad():
        torch.testing.assert_close(problem().hvp(torch.ones_like(V)), expected)
    with torch.inference_mode():
        assert problem().size == 51


def test_what_the_repr_says():
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5), nn.Dropout(0.0)).double()
    made = ns.Problem(model, LOSS, [BATCH], mode="eval", parameters="0.weight", dtype=torch.float64, reduction="sum")
    assert repr(made) == (
        "Problem(Sequential, 18 of 21 parameters, 1 batches, evaluation mode, torch.float64, summed loss, "
        "dropout evaluated in 1 modules)"
    )
    assert (
        repr(problem().operator()) == "Operator(hessian, 51 parameters, Problem(Sequential, 51 parameters, 1 batches))"
    )


class Careless(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x):
        rate = self.dropout.p if self.training else 0.0
        return self.norm(self.linear(F.dropout(x, rate, True)))


def test_dropout_written_into_a_forward_method_is_evaluated_and_norms_still_train():
    model = Careless()
    problem = ns.Problem(model, lambda output, target: (output**2).sum() + output[0].sum(), [(torch.randn(8, 4), None)])
    one, two = (problem.hvp(torch.ones(problem.size)) for _ in range(2))
    assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
    assert not drops(model.norm)
    assert drops(model)
    assert model.training
