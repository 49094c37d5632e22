"""Structure and optimizer in attached runs: each finding fires on a model made wrong, and not on one made well."""

import pytest
import torch
from torch import nn

import normscope as ns
from normscope.core.finding import Verdict
from normscope.diagnostics import DIAGNOSTICS, optimizer, structure
from tests.diagnostics.test_propagation import only
from tests.metrics.records import Network

FAILURE, WARNING, UNDECIDED, NOTE, OK = Verdict


class Block(nn.Module):
    def __init__(self, norm, width=8, calls=True):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = norm
        self.calls = calls

    def forward(self, x):
        y = self.conv(x)
        return torch.relu(self.norm(y) if self.calls else y) + x


def convolutional(*norms, tail=()):
    blocks = [Block(norm) for norm in norms]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, *tail, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def plain(*layers, **options):
    return nn.Sequential(nn.Linear(8, 8, **options), *layers, nn.Linear(8, 3, **options))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


def attached(model, make=sgd, batch=None, steps=2):
    """Train for some steps and return the record."""
    torch.manual_seed(0)
    first = next(model.parameters())
    shape = (16, 3, 8, 8) if first.dim() == 4 else (16, 8)
    batch = torch.randn(shape if batch is None else batch, dtype=first.dtype)
    optimizers = make(model)
    with ns.attach(model, optimizers, every=1, probes=("normalization", "parameters")) as scope:
        for _ in range(steps):
            output = model(batch)
            (output - 1).square().mean().backward()
            for item in optimizers if isinstance(optimizers, list) else [optimizers]:
                item.step()
                item.zero_grad()
        return scope.record()


def bn():
    return nn.BatchNorm2d(8)


def shared_norm(sizes):
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), bn(), nn.Linear(8, 3)

        def forward(self, x):
            levels = [self.norm(self.conv(x[..., :size, :size])).mean((2, 3)) for size in sizes]
            return self.head(sum(levels))

    return Pyramid()


def frozen(model, *names):
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(names))
    return model


def zeroed(model, *names):
    for name in names:
        nn.init.zeros_(model.get_submodule(name).weight)
    return model


def half(dtype, model):
    return model.to(dtype)


def adamw(**options):
    return lambda model: torch.optim.AdamW(model.parameters(), **{"lr": 1e-3, **options})


CASES = [
    # diagnostic, verdict, site, model, optimizer
    (structure.few_values, FAILURE, "1/input", lambda: plain(nn.GroupNorm(8, 8)), sgd),
    (structure.few_values, FAILURE, "2/input", lambda: plain(nn.Linear(8, 1), nn.LayerNorm(1), nn.Linear(1, 8)), sgd),
    (structure.few_values, WARNING, "1/input", lambda: plain(nn.GroupNorm(4, 8)), sgd),
    (structure.few_values, WARNING, "2/input", lambda: plain(nn.Linear(8, 1), nn.RMSNorm(1), nn.Linear(1, 8)), sgd),
    (structure.few_values, OK, "", lambda: plain(nn.GroupNorm(2, 8), nn.LayerNorm(8), nn.BatchNorm1d(8)), sgd),
    (structure.few_values, OK, "", lambda: convolutional(nn.InstanceNorm2d(8)), sgd),
    (structure.dropout_before_norm, WARNING, "2/input", lambda: plain(nn.Dropout(0.5), nn.BatchNorm1d(8)), sgd),
    (
        structure.dropout_before_norm,
        WARNING,
        "3/input",
        lambda: plain(nn.Dropout(0.5), nn.Identity(), nn.BatchNorm1d(8)),
        sgd,
    ),
    (structure.dropout_before_norm, NOTE, "2/input", lambda: plain(nn.Dropout(0.2), nn.BatchNorm1d(8)), sgd),
    (structure.dropout_before_norm, OK, "", lambda: plain(nn.BatchNorm1d(8), nn.Dropout(0.5)), sgd),
    (structure.dropout_before_norm, None, "", lambda: plain(nn.Dropout(0.5), nn.LayerNorm(8)), sgd),
    (
        structure.never_reached,
        WARNING,
        "1.norm/output",
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Block(bn(), calls=False)),
        sgd,
    ),
    (structure.never_reached, OK, "", lambda: convolutional(bn()), sgd),
    (structure.missing_norm, WARNING, "3.norm/output", lambda: convolutional(bn(), bn(), nn.Identity(), bn()), sgd),
    (structure.missing_norm, NOTE, "1.norm/output", lambda: convolutional(nn.Identity(), bn(), bn(), bn()), sgd),
    (structure.missing_norm, OK, "", lambda: convolutional(bn(), bn(), bn(), bn()), sgd),
    (structure.missing_norm, OK, "", lambda: convolutional(nn.Identity(), bn(), nn.Identity(), bn()), sgd),
    (structure.missing_norm, None, "", lambda: convolutional(nn.Identity(), nn.Identity()), sgd),
    (structure.shared_norm, WARNING, "norm/running", lambda: shared_norm((8, 6, 4)), sgd),
    (structure.shared_norm, NOTE, "norm/running", lambda: shared_norm((8, 8)), sgd),
    (structure.shared_norm, OK, "", lambda: convolutional(bn(), bn()), sgd),
    (structure.eps, WARNING, "1/output", lambda: plain(nn.LayerNorm(8, eps=0.1)), sgd),
    (structure.eps, WARNING, "1/output", lambda: plain(nn.RMSNorm(8, eps=0.0)), sgd),
    (structure.eps, OK, "", lambda: plain(nn.LayerNorm(8, eps=1e-12), nn.BatchNorm1d(8, eps=1e-3)), sgd),
    (structure.mixed_kinds, NOTE, "2/output", lambda: plain(nn.LayerNorm(8), nn.BatchNorm1d(8), nn.LayerNorm(8)), sgd),
    (structure.mixed_kinds, OK, "", lambda: plain(nn.LayerNorm(8), nn.LayerNorm(8)), sgd),
    (structure.zero_gains, WARNING, "1/output", lambda: zeroed(plain(nn.LayerNorm(8), nn.LayerNorm(8)), "1", "2"), sgd),
    (
        structure.zero_gains,
        NOTE,
        "1.0/output",
        lambda: zeroed(plain(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8))), "1.0"),
        sgd,
    ),
    (structure.zero_gains, OK, "", lambda: zeroed(plain(nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))), "1.1"), sgd),
    (structure.frozen_gains, WARNING, "1.norm/running", lambda: frozen(convolutional(bn(), bn()), "0", "1"), sgd),
    (structure.frozen_gains, OK, "", lambda: frozen(convolutional(bn(), bn()), "0"), sgd),
    (structure.frozen_gains, OK, "", lambda: still(frozen(convolutional(bn(), bn()), "0", "1")), sgd),
    (
        optimizer.missing_parameters,
        WARNING,
        "1/weight",
        lambda: plain(nn.LayerNorm(8)),
        lambda m: sgd(nn.ModuleList([m[0], m[2]])),
    ),
    (optimizer.missing_parameters, NOTE, "0/weight", lambda: plain(nn.LayerNorm(8)), lambda m: sgd(m[2])),
    (optimizer.missing_parameters, OK, "", lambda: frozen(plain(nn.LayerNorm(8)), "1"), sgd),
    (optimizer.parameter_twice, WARNING, "2/weight", lambda: plain(nn.LayerNorm(8)), lambda m: [sgd(m), sgd(m[2])]),
    (optimizer.parameter_twice, OK, "", lambda: plain(nn.LayerNorm(8)), lambda m: [sgd(m[:2]), sgd(m[2])]),
    (optimizer.eps, FAILURE, "0/weight", lambda: plain(nn.LayerNorm(8)).half(), adamw()),
    (optimizer.eps, OK, "", lambda: plain(nn.LayerNorm(8)).half(), adamw(eps=1e-6)),
    (optimizer.eps, OK, "", lambda: plain(nn.LayerNorm(8)).bfloat16(), adamw()),
    (optimizer.decay_lost, WARNING, "0/weight", lambda: plain(nn.LayerNorm(8)).bfloat16(), adamw(weight_decay=0.1)),
    (optimizer.decay_lost, OK, "", lambda: plain(nn.LayerNorm(8)).bfloat16(), adamw(lr=0.1, weight_decay=0.1)),
    (optimizer.decay_lost, None, "", lambda: plain(nn.LayerNorm(8)), adamw(weight_decay=0.1)),
    (optimizer.gains_stuck, WARNING, "1/weight", lambda: plain(nn.LayerNorm(8)).bfloat16(), adamw()),
    (optimizer.gains_stuck, OK, "", lambda: plain(nn.LayerNorm(8)).bfloat16(), adamw(lr=0.01)),
    (optimizer.gains_stuck, None, "", lambda: plain(nn.LayerNorm(8)), adamw()),
]


def still(model):
    model[1].norm.eval()
    return model


@pytest.mark.parametrize(("diagnostic", "verdict", "site", "make", "make_optimizer"), CASES)
def test_what_an_attached_run_shows(diagnostic, verdict, site, make, make_optimizer):
    found = diagnostic(attached(make(), make_optimizer))
    if verdict is None:
        assert found == []
        return
    finding = only(found)
    assert (finding.verdict, finding.site) == (verdict, site)
    assert finding.message.endswith(".")
    if verdict in (FAILURE, WARNING):
        assert finding.cause
        assert finding.remedy


def test_a_layer_used_without_being_called_is_not_left_out():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(nn.functional.layer_norm(x, (8,), self.norm.weight, self.norm.bias))

    assert only(structure.never_reached(attached(Functional()))).verdict is OK


def test_a_branch_that_is_not_taken_is_a_note():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.aux = plain(nn.LayerNorm(8)), plain(nn.LayerNorm(8))

        def forward(self, x):
            return self.body(x)

    found = only(structure.never_reached(attached(Auxiliary())))
    assert (found.verdict, found.site) == (NOTE, "aux.1/output")


def test_a_stage_built_in_another_way_is_no_block_that_lacks_a_norm():
    def stages(lacking):
        blocks = [[Block(bn() if (i, k) not in lacking else nn.Identity()) for k in range(3)] for i in range(5)]
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(*[nn.Sequential(*some) for some in blocks]))

    assert only(structure.missing_norm(attached(stages({(2, 0), (2, 1), (2, 2)})))).verdict is OK
    found = only(structure.missing_norm(attached(stages({(2, 0), (3, 1)}))))
    assert (found.verdict, found.sites) == (WARNING, ("1.2.0.norm/output", "1.3.1.norm/output"))


def test_one_gap_among_layers_in_a_row():
    def chain(without):
        layers = []
        for i in range(6):
            layers += [nn.Linear(8, 8), nn.Identity() if i == without else nn.LayerNorm(8), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(8, 3))

    found = only(structure.missing_norm(attached(chain(3))))
    assert (found.verdict, found.site, found.evidence["alike"]) == (WARNING, "9/output", 5)
    assert only(structure.missing_norm(attached(chain(0)))).verdict is OK
    assert only(structure.missing_norm(attached(chain(5)))).verdict is OK


def test_what_bfloat16_does_to_decay_and_gains():
    for rate, moves in ((2.0**-9 * 0.98, False), (2.0**-9 * 1.03, True)):
        weights = torch.randn(1000).bfloat16()
        assert (weights * (1 - rate) != weights).any() == moves
        gain = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        adam = torch.optim.AdamW([gain], lr=rate, weight_decay=0.0)
        for _ in range(20):
            gain.grad = torch.full_like(gain, 0.01)
            adam.step()
        assert (gain != 1).all() == moves


def test_the_usual_eps_of_adam_breaks_float16_and_a_larger_one_does_not():
    for eps, broken in ((1e-8, True), (2.0**-25, True), (2.0**-24, False), (1e-6, False)):
        weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
        weight.grad = torch.zeros_like(weight)
        torch.optim.AdamW([weight], eps=eps).step()
        assert weight.isnan().all() == broken


def test_a_schedule_counts_by_its_peak():
    def warmed(model):
        adam = torch.optim.AdamW(model.parameters(), lr=0.01)
        torch.optim.lr_scheduler.LinearLR(adam, 1e-3, total_iters=100)
        return adam

    model = plain(nn.LayerNorm(8)).bfloat16()
    found = only(optimizer.gains_stuck(attached(model, warmed)))
    assert found.verdict is OK


def test_parameters_that_cannot_be_read_are_no_obstacle():
    lazy = nn.Sequential(nn.Linear(8, 8), nn.LazyBatchNorm1d())
    assert [f for f in ns.lint(lazy, torch.optim.SGD(lazy.parameters())) if "failed on this record" in f.message] == []
    for change in ({"dtype": torch.float8_e4m3fn}, {"device": "meta"}):
        model = plain(nn.LayerNorm(8)).to(**change)
        found = {f.id: f for f in ns.lint(model, sgd(model))}
        assert "structure.zero-gains" not in found
        assert not [f for f in found.values() if "failed on this record" in f.message]


def test_processes_that_take_statistics_apart_are_a_note():
    record = attached(convolutional(bn()))
    record.runs[0]["structure"]["processes"] = 4
    found = only(structure.unsynchronized(record))
    assert (found.verdict, found.site, found.evidence["processes"]) == (NOTE, "1.norm/output", 4)
    assert structure.unsynchronized(attached(convolutional(bn()))) == []
    synchronized = attached(convolutional(bn()))
    synchronized.runs[0]["structure"]["processes"] = 4
    for row in synchronized.runs[0]["structure"]["modules"]:
        row["synchronized"] = True
    assert only(structure.unsynchronized(synchronized)).verdict is OK


def test_a_layer_that_computes_in_float16_loses_a_tiny_eps():
    class RMSNorm(nn.Module):
        def __init__(self, wide):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-8

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    class CastingRMSNorm(RMSNorm):
        def forward(self, x):
            return super().forward(x.float()).to(x.dtype)

    found = only(structure.eps(attached(plain(RMSNorm(True)).half())))
    assert (found.verdict, found.threshold) == (WARNING, 2.0**-25)
    assert only(structure.eps(attached(plain(CastingRMSNorm(True)).half()))).verdict is OK


@pytest.mark.parametrize(
    "diagnostic", [d for d in DIAGNOSTICS if d.__module__ in (structure.__name__, optimizer.__name__)]
)
def test_a_record_without_structure_gets_nothing(diagnostic):
    assert diagnostic(Network().record()) == []
