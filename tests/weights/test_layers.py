"""Putting methods on models: which layers, what is refused, what else still works."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize

import normscope as ns
from normscope import weights
from normscope.core import survey
from normscope.core.errors import ArgumentError
from normscope.core.source import cite
from normscope.weights import apply, in_manifold, initialize, regularizer, regularizers, remove, retract, zoo
from normscope.weights.layers import originals, parametrized

torch.set_num_threads(1)


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4)
    )


def paths(net):
    return [path for path, *_ in parametrized(net)]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, ["0", "3", "5"]),
        ("[03]", ["0", "3"]),
        (nn.Linear, ["5"]),
        ((nn.Linear, nn.Conv2d), ["0", "3", "5"]),
        (lambda path, module: path == "3", ["3"]),
    ],
)
def test_where(where, expected):
    assert paths(apply(model(), "oni", where)) == expected


def test_a_recurrent_method_takes_cells_and_a_kernel_method_convolutions():
    net = nn.ModuleDict({"cell": nn.RNNCell(3, 4), "conv": nn.Conv2d(3, 4, 3), "head": nn.Linear(4, 4)})
    assert paths(apply(copy.deepcopy(net), "givens")) == ["cell"]
    assert paths(apply(copy.deepcopy(net), "isometric")) == ["conv"]
    assert paths(apply(copy.deepcopy(net), "givens", "head")) == ["head"]
    assert paths(apply(copy.deepcopy(net), "orthogonal", parameter="weight_ih", groups=4)) == ["cell"]


def test_a_single_layer_and_a_shared_one():
    assert paths(apply(nn.Linear(4, 3), "wn")) == [""]
    shared = nn.Linear(4, 4)
    assert paths(apply(nn.Sequential(shared, shared), "wn")) == ["0"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: apply(model(), "orthogonl"), "name='orthogonl' is unknown; did you mean 'orthogonal'"),
        (lambda: apply(model(), "oni", iteration=3), "option='iteration' is unknown; did you mean 'iterations'"),
        (lambda: apply(model(), "oni", iterations=0), "iterations=0 must be a whole number, at least 1"),
        (lambda: apply(model(), "cayley", kind="householder"), "option='kind' is unknown"),
        (lambda: apply(model(), "oni", "conv*"), r"where='conv\*' matches no layer .*; layers: 0 \(Conv2d\), 3"),
        (lambda: apply(model(), "oni", 3), "where=3 must be a pattern of paths, a class or several, a function, or"),
        (lambda: apply(model(), "givens"), "where=None matches no layer for 'givens', which is meant for RNNCellBase"),
        (lambda: apply(model(), "givens", "5"), r"'5': name='givens' needs a square matrix, .* is \(4, 32\)"),
        (lambda: apply(nn.RNNCell(2, 3), "unitary"), "square matrix of even size"),
        (lambda: apply(nn.RNNCell(2, 3), "goru"), "square matrix of even size"),
        (lambda: apply(nn.RNNCell(2, 6), "goru", style="fft"), "a power of 2, not 6; try style='tunable'"),
        (lambda: apply(nn.RNNCell(2, 6), "goru", capacity=0), "capacity=0 must be at least 1"),
        (lambda: apply(nn.RNNCell(2, 6), "givens", layers=6), "layers=6 must be from 1 to 5, or None"),
        (lambda: apply(nn.RNNCell(2, 6), "scornn", negatives=7), "negatives=7 must be from 0 to 6"),
        (lambda: apply(nn.LSTM(2, 3), "oni", nn.LSTM), "LSTM keeps its weights where no parametrization reaches"),
        (lambda: apply(apply(model(), "oni"), "wn"), r"parametrized already; weights.remove\(model\) first"),
        (lambda: apply(Tied(), "oni"), r"'head': its weight is also embedding.weight, which would be left behind"),
        (lambda: apply(nn.LazyLinear(3), "oni"), "'weight' is no floating-point matrix"),
        (lambda: apply(nn.Linear(2, 2), "oni", parameter="bias"), "'bias' is no floating-point matrix"),
        (lambda: apply(model(), "orthogonal", groups=1, where="5"), None),
        (lambda: apply(nn.Linear(3, 8), "orthogonal", groups=1), "groups=1 makes groups of 8 units with a fan_in of 3"),
        (lambda: apply(nn.Linear(1, 8), "orthogonal"), "a fan_in of 1 is too small"),
        (lambda: apply(nn.Linear(3, 8), "orthogonal", groups=3), "groups=3 does not divide num_features=8"),
        (lambda: apply(nn.Linear(3, 8), "spectral", first="w"), "first='w' is unknown; Options: u, v"),
        (lambda: apply(nn.Linear(3, 8), "wn", per="col"), "per='col' is unknown"),
        (lambda: apply(nn.Linear(3, 8), "oni", side="long"), "side='long' is unknown"),
        (lambda: apply(nn.Linear(3, 8), "spectre", margin=2), "margin=2 must be from 0 to 1"),
        (lambda: apply(nn.Linear(3, 8), "parseval", beta=0), "beta=0 must be above 0"),
        (lambda: regularizer("sripp"), "name='sripp' is unknown; did you mean 'srip'"),
        (lambda: regularizer("so", sides="in"), "option='sides' is unknown; did you mean 'side'"),
        (lambda: regularizer("so", strength=0), "strength=0 must be above 0; the published one is 1"),
        (lambda: regularizer("so", "x")(model()), "where='x' matches no linear layer, convolution or recurrent cell"),
        (lambda: regularizer("so", side="on")(model()), "side='on' is unknown"),
        (lambda: regularizer("mc", norm="l1")(model()), "norm='l1' is unknown"),
        (lambda: regularizer("ocnn", side="in")(nn.Conv1d(2, 2, 3)), "side='in' needs a kernel of 2 dimensions, not 1"),
        (lambda: regularizer("bnm")(nn.LayerNorm(3), torch.ones(2, 3)), "norm=LayerNorm stores no running_mean"),
        (lambda: weights.selective_mask(torch.ones(1, 2, 2), torch.ones(1, 2, 2)), "1 covariances cannot be split"),
        (lambda: initialize(model(), torch.ones(1, 3, 6, 6)), r"apply\(model, 'weight-norm'\) first"),
        (lambda: weights.OrthogonalCell(2, 4, activation="tanh"), "activation='tanh' is unknown"),
    ],
)
def test_messages(call, message):
    if message is None:
        call()
        return
    with pytest.raises(ArgumentError, match=message):
        call()


def test_where_one_layer_cannot_take_it_none_does():
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(1, 4))
    with pytest.raises(ArgumentError, match=r"so it was to none. '1': a fan_in of 1"):
        apply(net, "orthogonal")
    assert paths(net) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["orthogonal", "oni", "weight-norm"])
def test_a_weight_that_is_not_finite_is_refused(name, value):
    net = model()
    with torch.no_grad():
        net[5].weight[0, 0] = value
    with pytest.raises(ArgumentError, match=r"so it was to none. '5': 'weight' holds NaN or infinity"):
        apply(net, name)
    assert paths(net) == []


@pytest.mark.parametrize("name", ["orthogonal", "weight-norm", "scaled-standardized"])
@pytest.mark.parametrize("method", ["right_inverse", "forward"])
def test_a_layer_that_fails_takes_back_the_layers_before_it(monkeypatch, name, method):
    net, layers = model(), weights.layers
    before = [(path, p, p.detach().clone()) for path, p in net.named_parameters()]
    make = layers._made

    def made(*args):
        found = make(*args)
        if args[1] == "5":

            def fails(*_):
                raise RuntimeError("no convergence")

            monkeypatch.setattr(found, method, fails)
        return found

    monkeypatch.setattr(layers, "_made", made)
    with pytest.raises(RuntimeError, match="no convergence"):
        apply(net, name)
    assert paths(net) == []
    after = list(net.named_parameters())
    assert [(path, id(p)) for path, p in after] == [(path, id(p)) for path, p, _ in before]
    assert all(torch.equal(p, values) for _, p, values in before)


@pytest.mark.parametrize("name", ["scaled-standardized", "weight-norm", "orthogonal"])
def test_a_frozen_layer_stays_frozen(name):
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).requires_grad_(False)
    net[1].requires_grad_(True)
    apply(net, name)
    assert not any(p.requires_grad for p in net[0].parameters())
    assert all(p.requires_grad for p in net[1].parameters())


def test_a_weight_that_cannot_be_assigned_says_so():
    cell = apply(nn.RNNCell(3, 4), "scaled-cayley")
    with pytest.raises(ArgumentError, match="a weight under ScaledCayley cannot be assigned"):
        cell.weight_hh = torch.eye(4)
    net = apply(nn.Linear(4, 4), "cayley")
    target = nn.init.orthogonal_(torch.empty(4, 4))
    net.weight = target
    torch.testing.assert_close(net.weight.detach(), target)


def test_the_parameters_are_those_that_the_method_trains_and_training_keeps_the_manifold():
    net = apply(model(), "orthogonal", "[03]", scale=1.0)
    apply(net, "parseval", "5", beta=0.1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 6, 6)).square().sum().backward()
        optimizer.step()
        retract(net)
    assert in_manifold(net, 1e-5) | {"5": True} == {"0": True, "3": True, "5": True}


def test_remove_leaves_what_others_have_put_on():
    net = apply(model(), "oni", "0")
    parametrizations.weight_norm(net[3])
    remove(net)
    assert paths(net) == []
    assert parametrize.is_parametrized(net[3])
    assert not parametrize.is_parametrized(net[0])


def test_states_of_weight_norm_fit_those_of_torch():
    ours, theirs = apply(nn.Conv2d(3, 4, 3), "wn"), parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_weight_norm_has_a_right_second_derivative_where_that_of_torch_is_wrong():
    g, v = torch.rand(4, 1).double().requires_grad_(), torch.randn(4, 7).double().requires_grad_()
    method = next(parametrized(apply(nn.Linear(7, 4).double(), "wn")))[3]
    assert torch.autograd.gradgradcheck(method.forward, (g, v))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, forward mode
def test_weight_norm_is_the_product_wherever_it_is_differentiated():
    method = next(parametrized(apply(nn.Linear(7, 4).double(), "wn")))[3]
    g, v, probe = torch.rand(4, 1).double(), torch.randn(4, 7).double(), torch.randn(4, 7).double()

    def used(g, v):
        return (method.forward(g, v) * probe).sum()

    def product(g, v):
        return (g * v / v.norm(dim=1, keepdim=True) * probe).sum()

    raw = g.clone().requires_grad_(), v.clone().requires_grad_()
    expected = torch.autograd.grad(product(*raw), raw)
    for found in (torch.autograd.grad(used(*raw), raw), torch.func.grad(used, (0, 1))(g, v)):
        torch.testing.assert_close(found, expected)
    many = torch.func.vmap(torch.func.grad(used, 1), (None, 0))(g, torch.stack([v, 2 * v]))
    torch.testing.assert_close(many, torch.stack([expected[1], expected[1] / 2]))
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual(used(g, forward_ad.make_dual(v, probe))).tangent
    torch.testing.assert_close(moved, (expected[1] * probe).sum())
    views = torch.rand(1, 4).double().requires_grad_(), torch.randn(7, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda g, v: method.forward(g.mT, v.mT), views)


@pytest.mark.parametrize("shape", [(40, 4), (4, 40), (32, 4), (9, 7), (7, 9), (6, 6), (5, 1), (1, 9)])
def test_the_cayley_map_is_that_of_torch_and_has_its_derivatives(shape):
    torch.manual_seed(0)
    layer = apply(nn.Linear(*shape[::-1], bias=False).double(), "cayley")
    method, chain = next(parametrized(layer))[3], layer.parametrizations.weight
    raw = torch.randn(shape, dtype=torch.float64).requires_grad_()
    probe = torch.randn(shape, dtype=torch.float64)
    ours, theirs = (f.forward(raw) for f in (method, method.inner))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    torch.testing.assert_close(*(torch.autograd.grad(w, raw, probe)[0] for w in (ours, theirs)))
    assert torch.autograd.gradgradcheck(method.forward, (raw * 0.1,))
    assert chain.original.shape == shape


def test_data_dependent_initialization_of_a_model():
    net = apply(model(), "wn")
    x = torch.randn(64, 3, 6, 6)
    seen = {}
    for place in (0, 3, 5):
        net[place].register_forward_hook(lambda module, args, output, place=place: seen.update({place: output}))
    initialize(net, x, scale=2.0)
    for output in seen.values():
        values = output.movedim(1, -1).flatten(0, -2)
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(values.std(0, correction=0), torch.full((values.shape[1],), 2.0), atol=1e-3, rtol=0)
    assert all("forward" not in vars(module) for module in net.modules())
    unused = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Identity()})
    unused.forward = lambda value: value
    with pytest.raises(ArgumentError, match="none of the weight-normalized layers runs"):
        initialize(apply(unused, "wn"), x)


def test_norms_convert_and_attach_see_through_parametrizations():
    net = apply(model(), "standardized")
    ns.norms.convert(net, to="group", groups=4)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    with ns.attach(net, optimizer, every=1) as scope:
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(4, 3, 6, 6)).square().sum().backward()
            optimizer.step()
    sites = set(scope.record().sites["site"])
    assert "3/output" in sites
    assert not [site for site in sites if "parametrizations" in site and "weight" not in site]
    assert list(scope.record().events.loc[scope.record().events["kind"] == "probe-failed", "message"]) == []


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("name", ["oni", "wn", "spectral", "orthogonal"])
def test_compiled_in_eager_backend(name):
    net = apply(model(), name).eval()
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(torch.compile(net, backend="eager")(x), net(x))


def test_a_penalty_sees_the_weight_in_use_and_leaves_the_model_alone():
    net = apply(model(), "orthogonal", scale=1.0)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    values = regularizer("so").per_layer(net)
    assert list(values) == ["0", "3", "5"]
    assert max(float(v.detach()) for v in values.values()) < 1e-8
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    shared = nn.Linear(4, 4)
    assert list(regularizer("so").per_layer(nn.Sequential(shared, nn.Sequential(shared)))) == ["0"]
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert list(regularizer("so").per_layer(tied)) == ["0"]
    assert list(regularizer("so").per_layer(nn.RNNCell(3, 4))) == [""]


def test_isometric_skips_what_the_paper_skips():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 7), nn.Conv2d(4, 4, 3), nn.Linear(4, 4))
    assert list(regularizer("isonet").per_layer(net)) == ["2"]


def test_penalties_say_how_they_are_made():
    assert repr(regularizer("so", "a*", side="in")) == (
        "regularizer('soft-orthogonality', where='a*', strength=1.0, side='in')"
    )
    assert repr(zoo["own"]) == "apply(model, 'orthogonal', groups=None, scale=1.414)  # S082"


def test_rows_have_sources_and_the_catalog_has_all_names():
    for row in [*zoo.values(), *regularizers.values()]:
        assert cite(row.source).url
    names = {n for work in survey.works() for n in work.provides if n.startswith(("weight:", "regularizer:"))}
    assert names <= set(survey.PROVIDED)
    for name in names:
        kind, _, short = name.partition(":")
        row = (zoo if kind == "weight" else regularizers)[short]
        assert {work.id for work in survey.works() if name in work.provides} >= {row.source}
    for row in zoo.values():
        layer = nn.RNNCell(2, 4) if row.layers == (nn.RNNCellBase,) else nn.Conv2d(2, 4, 3)
        assert next(parametrized(apply(layer, row.name)))[3].invariance == row.invariance
        assert originals(layer, "weight_hh" if isinstance(layer, nn.RNNCell) else "weight")
    assert str(zoo).startswith("23 normalizations of weights")
    assert str(regularizers).startswith("11 penalties")
