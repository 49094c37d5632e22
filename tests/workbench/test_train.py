import math
from itertools import islice

import pytest
import torch
from torch import nn

from normscope.core.errors import ArgumentError
from normscope.workbench import (
    accuracy,
    batches,
    cross_entropy,
    evaluate,
    fit,
    mlp,
    mnist,
    residual_cnn,
    split,
    text,
    transformer,
    windows,
)


def problem(seed):
    torch.manual_seed(seed)
    model = mlp([6, 8, 3])
    inputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(9))
    drawn = batches(inputs, (inputs[:, 0] > 0).long(), 10, torch.Generator().manual_seed(seed))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), drawn


def test_equal_seeds_give_equal_losses_and_others_do_not():
    one, same, other = (fit(*problem(seed), cross_entropy, steps=30, progress=False) for seed in (0, 0, 1))
    assert one == same != other
    assert sum(one[-5:]) < 0.6 * sum(one[:5])


def test_fit_equals_the_loop_written_out():
    model, optimizer, drawn = problem(0)
    losses = fit(model, optimizer, drawn, cross_entropy, steps=3, progress=False)
    expected, twin, again = [], *problem(0)[::2]
    for inputs, targets in islice(again, 3):
        value = nn.functional.cross_entropy(twin(inputs), targets)
        gradients = torch.autograd.grad(value, list(twin.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
        expected.append(value.item())
    assert losses == pytest.approx(expected, rel=1e-6)
    for parameter, reference in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, reference)


def test_on_step_sees_each_step_and_no_batch_too_many_is_drawn():
    model, optimizer, drawn = problem(0)
    taken, seen = [], []
    watched = (taken.append(1) or batch for batch in drawn)
    losses = fit(model, optimizer, watched, cross_entropy, steps=4, on_step=lambda *a: seen.append(a), progress=False)
    assert seen == list(enumerate(losses))
    assert len(taken) == 4


def test_progress_goes_to_stderr_and_only_when_asked(capsys):
    fit(*problem(0), cross_entropy, steps=2)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "2/2" in shown.err
    fit(*problem(0), cross_entropy, steps=2, progress=False)
    assert capsys.readouterr().err == ""


def test_fit_keeps_the_mode_of_the_model():
    model, optimizer, drawn = problem(0)
    model.layer1.norm.eval()
    fit(model, optimizer, drawn, cross_entropy, steps=2, progress=False)
    assert model.training
    assert model.layer1.norm.num_batches_tracked == 0


def test_evaluate_weighs_batches_by_size_and_restores_each_mode():
    model = problem(0)[0]
    model.layer1.norm.eval()
    buffers = [buffer.clone() for buffer in model.buffers()]
    inputs, targets = torch.randn(7, 6), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    measured = evaluate(model, zip(inputs.split(4), targets.split(4), strict=True), cross_entropy)
    assert model.training
    assert model.layer1.training
    assert not model.layer1.norm.training
    assert all(one.equal(other) for one, other in zip(buffers, model.buffers(), strict=True))
    model.eval()
    assert measured == pytest.approx(cross_entropy(model(inputs), targets).item(), rel=1e-6)


def test_evaluate_restores_the_mode_after_an_error():
    model = problem(0)[0]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        evaluate(model, [(torch.zeros(2, 5), torch.zeros(2))])
    assert all(module.training for module in model.modules())


def test_metrics_take_sequences_as_well():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [2.0, 0.0]]])
    target = torch.tensor([[0, 1], [0, 1]])
    assert accuracy(logits, target) == 0.75
    wrong, right = math.log(1 + math.exp(2)), math.log(1 + math.exp(-2))
    assert cross_entropy(logits, target).item() == pytest.approx((3 * right + wrong) / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, o, b: fit(m, o, islice(b, 2), cross_entropy, steps=3, progress=False),
            "ran out after 2 of steps=3",
        ),
        (lambda m, o, b: evaluate(m, []), "batches is empty"),
    ],
)
def test_missing_batches_are_an_error(call, message):
    with pytest.raises(ArgumentError, match=message):
        call(*problem(0))


@pytest.fixture(scope="module")
def digits():
    torch.set_num_threads(1)
    return split(*mnist(), seed=0)


def learn(model, train, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    drawn = batches(*train, 64, torch.Generator().manual_seed(0))
    return fit(model, optimizer, drawn, cross_entropy, steps=steps, progress=False)


def test_a_perceptron_learns_the_digits(digits):
    (train, (images, labels)) = digits
    torch.manual_seed(0)
    model = mlp([784, 64, 10])
    chance = evaluate(model, [(images, labels)])
    learn(model, train, steps=60)
    assert chance < 0.3 < 0.85 < evaluate(model, zip(images.split(300), labels.split(300), strict=True))


def test_the_residual_cnn_learns_the_digits(digits):
    torch.manual_seed(0)
    losses = learn(residual_cnn(channels=8, blocks=(1, 1)), digits[0], steps=60)
    assert losses[0] > 2
    assert sum(losses[-5:]) / 5 < 1.6


def test_the_transformer_learns_the_text():
    torch.manual_seed(0)
    tokens, vocabulary = text()
    model = transformer(len(vocabulary), width=32, layers=1, heads=2, context=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    drawn = windows(tokens, 16, 32, torch.Generator().manual_seed(0))
    losses = fit(model, optimizer, drawn, cross_entropy, steps=60, progress=False)
    assert losses[0] > 4
    assert sum(losses[-5:]) / 5 < 3
