"""Pictures of curvature, from a small network that was really trained."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normscope as ns
from normscope.figures import OVERVIEW, curvature
from normscope.figures.draw import draw
from normscope.metrics import curvature as metrics
from normscope.report.page import page

FIGURES = dict(OVERVIEW)["Curvature"]


@pytest.fixture(scope="module", params=[torch.optim.SGD, torch.optim.AdamW])
def record(request):
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())))
    optimizer = request.param(model.parameters(), 0.01)
    x = torch.randn(64, 8)
    y = x[:, :3].argmax(1)
    held = ns.Problem(model, F.cross_entropy, [(x, y)])
    with ns.attach(model, optimizer, every=2, problem=held, probes="curvature") as scope:
        for _ in range(400):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return scope.record()


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.id)
def test_a_figure_prepares_the_columns_it_declares_and_draws(figure, record):
    frame = figure.prepare(record, ())
    assert tuple(frame.columns) == figure.columns
    assert np.isfinite(frame[figure.columns[1]].to_numpy(float)).any()
    assert frame[figure.columns[2]].nunique() <= 4
    assert len(draw(figure, frame).lines) == frame[figure.columns[2]].nunique()


def test_the_edge_is_drawn_beside_the_sharpness_that_counts(record):
    frame = curvature.SHARPNESS.prepare(record, ())
    stability = metrics.stability(record)
    first = frame["curve"].iloc[0]
    assert frame.loc[frame["curve"] == first, "eigenvalue"].tolist() == stability["sharpness"].tolist()
    assert frame.loc[frame["curve"] == "edge of stability", "eigenvalue"].tolist() == stability["edge"].tolist()
    assert ("P⁻¹H" in first) == (metrics.snapshots(record)["preconditioned"].notna().any())


def test_the_spectrum_is_that_of_the_first_and_the_last_snapshot(record):
    frame = curvature.SPECTRUM.prepare(record, ())
    kept = metrics.spectra(record)
    assert frame["step"].unique().tolist() == [f"step {min(kept)}", f"step {max(kept)}"]
    nodes, weights = kept[max(kept)]
    last = frame[frame["step"] == f"step {max(kept)}"].fillna(0.0)
    assert {*nodes} <= {*last["eigenvalue"]}
    mean = np.trapezoid(last["density"] * last["eigenvalue"], last["eigenvalue"])
    assert mean == pytest.approx(weights @ nodes, rel=0.02, abs=0.002 * np.ptp(nodes))


def test_the_layer_of_the_finding_is_pointed_at(record):
    frame = curvature.LAYERS.prepare(record, ("3/weight",))
    assert frame.loc[frame["step"] == "layer named in the finding", "layer"].tolist() == [2]


def test_the_page_has_a_section_of_the_subject_with_every_picture(record):
    text = page(record, ns.diagnose(record))
    section = text.partition('<section id="curvature"')[2].partition("</section>")[0]
    assert [figure.id for figure in FIGURES if f'data-picture="{figure.id}"' not in section] == []
    assert '<a href="#curvature">Curvature</a>' in text
