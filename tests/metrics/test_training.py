"""What a run does not train: a layer between trained ones, and a table of positions that none feeds."""

import pytest
import torch
from torch import nn

import normscope as ns
from normscope.core.finding import Verdict
from normscope.diagnostics import training as diagnostics
from normscope.metrics import training


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.place, self.norm = nn.Linear(6, 8), nn.Embedding(5, 8), nn.LayerNorm(8)
        self.middle, self.last = nn.Linear(8, 8), nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))

    def forward(self, x):
        return self.last(self.middle(self.norm(self.first(x) + self.place(torch.arange(5)))))


@pytest.mark.parametrize(("frozen", "verdict"), [("place", Verdict.NOTE), ("middle", Verdict.WARNING)])
def test_a_frozen_table_has_no_layer_before_it(frozen, verdict):
    torch.manual_seed(0)
    model = Positions()
    getattr(model, frozen).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with ns.attach(model, optimizer, every=1) as scope:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 5, 6)).square().mean().backward()
            optimizer.step()
    frame = training.untrained(scope.record())
    assert frame.loc[f"{frozen}/weight", "reason"] == "frozen"
    assert frame.loc[f"{frozen}/weight", "enclosed"] == (frozen == "middle")
    (found,) = diagnostics.untrained(scope.record())
    assert found.verdict is verdict
