"""Closed forms against a random walk on which growth and decay of the norm act alone."""

import math

import numpy as np
import pytest

from normscope.metrics import equilibrium

D, STEPS = 400, 6000


def angle_between(a, b):
    """Angle by the cross product's way: of the part of b - a across a, and of b along a."""
    along = a @ b / (a @ a)
    return math.atan2(np.linalg.norm(b - along * a), along * np.linalg.norm(a))


def walk(update, rate, decay, start, seed=0):
    """Take steps with random gradients of norm 1 / |w| across w; return angle, size and norm of the later half."""
    random = np.random.default_rng(seed)
    w = random.normal(size=D)
    w *= start / np.linalg.norm(w)
    state: dict = {}
    angles, relative, radial, norms = [], [], [], []
    for step in range(STEPS):
        g = random.normal(size=D)
        size = np.linalg.norm(w)
        g -= (g @ w) / size**2 * w
        g /= np.linalg.norm(g) * size
        new = update(w, g, rate, decay, state, step)
        if step >= STEPS // 2:
            dw = new - w
            angles.append(angle_between(w, new))
            relative.append(np.linalg.norm(dw) / size)
            radial.append(w @ dw / size**2)
            norms.append(size)
        w = new
    return np.array(angles), np.array(relative), np.array(radial), np.array(norms)


def sgd(momentum=0.0, nesterov=False, dampening=0.0):
    def update(w, g, rate, decay, state, step):
        d = g + decay * w
        if momentum:
            state["v"] = momentum * state["v"] + (1 - dampening) * d if step else d
            d = d + momentum * state["v"] if nesterov else state["v"]
        return w - rate * d

    return update


def adamw(w, g, rate, decay, state, step):
    m = state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
    v = state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * g**2
    mean, var = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
    return (1 - rate * decay) * w - rate * mean / np.sqrt(var)


CASES = {
    "sgd": (sgd(), {}),
    "momentum": (sgd(0.9), {"momentum": 0.9}),
    "half": (sgd(0.5), {"momentum": 0.5}),
    "nesterov": (sgd(0.9, nesterov=True), {"momentum": 0.9, "nesterov": True}),
    "dampening": (sgd(0.9, dampening=0.5), {"momentum": 0.9, "dampening": 0.5}),
    "adamw": (adamw, {"momentum": 0.9, "rule": "adam", "decoupled": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_angle_and_balance_of_a_random_walk(case):
    update, options = CASES[case]
    adam = case == "adamw"
    rate, decay = (0.01, 0.5) if adam else (0.1, 0.01)
    shrink = equilibrium.shrinkage(rate, decay, **options)
    s1, _ = equilibrium.response(**{"momentum": 0.0} | {k: v for k, v in options.items() if k != "decoupled"})
    start = math.sqrt(rate**2 * D / (2 * shrink)) if adam else (rate**2 * s1**2 / (2 * shrink)) ** 0.25
    angles, relative, radial, norms = walk(update, rate, decay, start)
    expected = equilibrium.angle(rate, decay, **options)
    assert math.sqrt((angles**2).mean()) == pytest.approx(expected, rel=0.005)
    assert norms.mean() == pytest.approx(start, rel=0.03)
    balance = equilibrium.balance(relative, radial, np.full(len(angles), shrink))
    assert balance.mean() == pytest.approx(1.0, abs=0.1)


def test_published_forms():
    """Wan et al. 2020 and Kosson et al. 2023, with the numbers seen for them."""
    assert equilibrium.angle(0.05, 0.01) == pytest.approx(math.sqrt(2 * 0.05 * 0.01), rel=1e-12)
    assert equilibrium.angle(0.05, 0.01, 0.9) == pytest.approx(math.sqrt(2 * 0.05 * 0.01 / 1.9), rel=1e-12)
    assert equilibrium.angle(0.05, 0.01, 0.9) == pytest.approx(0.02294, abs=1e-5)
    adam = {"rule": "adam", "decoupled": True}
    assert equilibrium.angle(3e-3, 0.5, 0.9, **adam) == pytest.approx(math.sqrt(2 * 3e-3 * 0.5 * 0.1 / 1.9), rel=1e-12)
    assert equilibrium.shrinkage(0.1, 0.01, 0.9) == pytest.approx(0.01)
    assert equilibrium.shrinkage(0.1, 0.01, 0.9, rule="muon", decoupled=True) == pytest.approx(0.001)


def test_what_has_no_closed_form_is_nan():
    assert math.isnan(equilibrium.angle(0.1, 0.01, 0.9, rule="muon", decoupled=True))
    assert math.isnan(equilibrium.shrinkage(0.1, 0.01, 0.9, rule="adam"))
    assert math.isnan(equilibrium.angle(0.1, 0.01, 0.9, rule=""))
    assert math.isinf(equilibrium.time_constant(0.0, "sgd"))
    assert np.isnan(equilibrium.balance(np.array([0.1]), np.array([0.0]), np.array([0.0])))


def test_balance_is_growth_over_decay():
    w, new, k = 3.0, 3.1, 0.01
    expected = (new**2 - (1 - k) ** 2 * w**2) / ((1 - (1 - k) ** 2) * w**2)
    dw = new - w
    assert equilibrium.balance(np.array([dw / w]), np.array([dw / w]), np.array([k]))[0] == pytest.approx(expected)
    assert equilibrium.balance(np.array([k]), np.array([-k]), np.array([k]))[0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("start", [0.3, 3.0])
def test_time_to_balance_solves_the_norms_equation(rule, start):
    """d|w|^2 / dt = growth - 2 k |w|^2, with growth 1 / |w|^2 for SGD and constant for Adam, followed step by step."""
    k, growth = 1e-3, 2e-3
    square = start * (math.sqrt(growth / (2 * k)) if rule == "sgd" else growth / (2 * k))
    gain = (lambda s: growth / s) if rule == "sgd" else (lambda s: growth)
    balance = gain(square) / (2 * k * square)
    predicted = equilibrium.steps_to_balance(balance, equilibrium.time_constant(k, rule))
    steps = 0
    while not 0.8 <= gain(square) / (2 * k * square) <= 1.25:
        square += gain(square) - 2 * k * square
        steps += 1
    assert predicted == pytest.approx(steps, rel=0.02)


def test_time_to_balance_at_its_ends():
    assert equilibrium.steps_to_balance(1.0, 1000.0) == 0
    assert math.isinf(equilibrium.steps_to_balance(-0.1, 1000.0))
