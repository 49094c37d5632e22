"""Transforms around any optimizer: what the inner one gets, and that the user's gradients stay."""

import pytest
import torch
from torch import nn

from normscope.gradients import AdaptiveClipped, BlockNormalized, Centralized
from normscope.gradients.transform import centralize, clip_units
from tests.gradients.cases import batch, small_model

torch.set_num_threads(1)


def losses(model, step):
    x, y = batch(step)
    return nn.functional.cross_entropy(model(x), y)


def run(model, optimizer, change=lambda p: p.grad, steps=4):
    """Train; `change` is applied to gradients by hand."""
    for step in range(steps):
        optimizer.zero_grad()
        losses(model, step).backward()
        for p in model.parameters():
            p.grad = change(p)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "inner",
    [
        lambda params: torch.optim.Adam(params, lr=0.01),
        lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
        lambda params: torch.optim.RMSprop(params, lr=0.01),
        lambda params: torch.optim.SGD(params, lr=0.1, maximize=True),
    ],
)
@pytest.mark.parametrize(
    ("transform", "change"),
    [
        (Centralized, lambda p: centralize(p.grad)),
        (AdaptiveClipped, lambda p: clip_units(p.detach(), p.grad, 0.01)),
        (BlockNormalized, lambda p: p.grad / (p.grad.norm() + 1e-6)),
    ],
)
def test_the_inner_optimizer_gets_what_a_hand_would_give_it(transform, change, inner):
    model, other = small_model(), small_model()
    found = run(model, transform(inner(model.parameters())))
    torch.testing.assert_close(found, run(other, inner(other.parameters()), change), rtol=0, atol=1e-12)


@pytest.mark.parametrize("maximize", [False, True])
def test_decay_in_the_gradient_is_centralized_with_it(maximize):
    settings = {"lr": 0.1, "weight_decay": 0.1, "maximize": maximize}
    model, other = small_model(), small_model()
    sign = -1 if maximize else 1
    found = run(model, Centralized(torch.optim.SGD(model.parameters(), **settings)))
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    expected = run(other, plain, lambda p: centralize(sign * p.grad + 0.1 * p.detach()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_an_optimizer_that_evaluates_several_times_gets_changed_gradients_each_time():
    def train(model, optimizer, change):
        def closure():
            optimizer.zero_grad()
            loss = losses(model, 0)
            loss.backward()
            if change:
                for p in model.parameters():
                    p.grad = centralize(p.grad)
            return loss

        for _ in range(2):
            optimizer.step(closure)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def inner(model):
        return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

    model, other = small_model(), small_model()
    found = train(model, Centralized(inner(model)), change=False)
    torch.testing.assert_close(found, train(other, inner(other), change=True))
    assert model[0].weight.grad.mean() != 0  # the last evaluation's own gradient is there, not the centralized one


def test_a_closure_that_adds_to_gradients_adds_to_the_original_ones():
    model = small_model()
    optimizer = AdaptiveClipped(torch.optim.SGD(model.parameters(), lr=0.0))
    losses(model, 0).backward()
    losses(model, 1).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses(model, 0).backward()

    def closure():
        loss = losses(model, 1)
        loss.backward()
        return loss

    optimizer.step(closure)
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_gradients_are_back_when_the_step_fails():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no step today")

    model = small_model()
    losses(model, 0).backward()
    held = [p.grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="no step today"):
        Centralized(Failing(model.parameters(), lr=0.1)).step()
    assert all(p.grad is grad for p, grad in zip(model.parameters(), held, strict=True))


def test_a_group_can_be_left_unclipped():
    model = small_model()
    groups = [{"params": model[:3].parameters()}, {"params": model[3:].parameters(), "clipping": None}]
    optimizer = AdaptiveClipped(torch.optim.SGD(groups, lr=1.0), clipping=1e-6)
    before = [p.detach().clone() for p in model.parameters()]
    losses(model, 0).backward()
    optimizer.step()
    moved = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    grads = [p.grad for p in model.parameters()]
    assert moved[0].norm() < 1e-3 * grads[0].norm()
    torch.testing.assert_close(moved[-2:], grads[-2:])


def test_it_says_what_is_inside():
    optimizer = Centralized(torch.optim.SGD(small_model().parameters(), lr=0.1))
    assert repr(optimizer).startswith("Centralized(SGD (")
    assert optimizer.param_groups is optimizer.optimizer.param_groups
