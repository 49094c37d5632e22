"""What the page shows of every subject whatever was found, on a real run."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

import normscope as ns
from normscope import figures
from normscope.report import page as pages
from normscope.report.page import page
from normscope.scope.session import PROBES


class Attends(nn.Module):
    """Attention over three parts of a vector."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        parts = x.unflatten(1, (3, 4))
        return (parts + self.attend(parts, parts, parts, need_weights=False)[0]).flatten(1)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU())]
    model = nn.Sequential(*layers, Attends(), nn.Linear(12, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)

    def batch(size):
        return torch.randn(size, 12, generator=generator), torch.randint(3, (size,), generator=generator)

    problem = ns.Problem(model, nn.functional.cross_entropy, [batch(128)])
    probes = (*PROBES, "correlation")
    with ns.attach(model, optimizer, every=2, problem=problem, probes=probes) as scope:
        for _ in range(40):
            inputs, targets = batch(64)
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.step(loss=loss)
    return scope.record()


@pytest.mark.parametrize(
    ("subject", "figure"), [(subject, figure) for subject, some in figures.OVERVIEW for figure in some]
)
def test_each_picture_of_a_subject_is_drawn_without_a_finding(trained, subject, figure):
    frame = figure.prepare(trained, ())
    assert tuple(frame.columns) == figure.columns
    assert len(frame), (subject, figure.id)


def test_every_subject_has_its_section_in_order(trained):
    text = page(trained, ns.diagnose(trained))
    at = [text.index(f">{subject}</h2>") for subject, _ in figures.OVERVIEW]
    assert at == sorted(at)


def test_a_broken_picture_does_not_take_the_page_away(trained, monkeypatch, caplog):
    def broken(record, sites):
        raise RuntimeError("out of ink")

    (name, (first, *others)), *rest = figures.OVERVIEW
    monkeypatch.setattr(pages, "OVERVIEW", ((name, (replace(first, prepare=broken), *others)), *rest))
    with caplog.at_level(logging.WARNING, "normscope"):
        text = page(trained, ns.diagnose(trained))
    assert others[0].title in text
    assert f"left the picture {first.id!r} out: RuntimeError: out of ink" in caplog.text
