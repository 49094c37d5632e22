"""Pictures of conditioning, from a small network that was really trained."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normscope as ns
from normscope.core.store import Store
from normscope.figures import OVERVIEW, conditioning
from normscope.figures.draw import draw
from normscope.metrics import conditioning as metrics
from normscope.report.page import page
from normscope.report.pictures import picture

FIGURES = dict(OVERVIEW)["Conditioning"]


@pytest.fixture(scope="module")
def record():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(8, 8), nn.Tanh())), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ns.attach(model, optimizer, every=10, probes=("covariance", "correlation")) as scope:
        for _ in range(120):
            x = torch.randn(64, 8)
            optimizer.zero_grad()
            F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    return scope.record()


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.id)
def test_a_figure_prepares_the_columns_it_declares_and_draws(figure, record):
    frame = figure.prepare(record, ())
    assert tuple(frame.columns) == figure.columns
    assert np.isfinite(frame[figure.columns[1]].to_numpy(float)).any()
    assert frame[figure.columns[2]].nunique() <= 4
    ax = draw(figure, frame)
    drawn = ax.collections if figure.mark == "cell" else ax.lines
    assert len(drawn) == frame[figure.columns[2]].nunique()


@pytest.mark.parametrize(
    ("figure", "site", "layer"),
    [
        (conditioning.KAPPA, "6/input", 3),
        (conditioning.GRADIENT, "6/output", 3),
        (conditioning.CURVATURE, "12/output", 6),
        (conditioning.RANK, "2/input", 1),
    ],
)
def test_the_layer_of_the_finding_is_pointed_at(figure, site, layer, record):
    frame = figure.prepare(record, (site,))
    named = frame[frame["step"] == "layer named in the finding"]
    assert named["layer"].tolist() == [layer]
    assert site in set(frame["site"])


def test_a_curve_over_depth_holds_what_was_last_known_of_each_layer(record):
    frame = conditioning.KAPPA.prepare(record, ())
    kappa = metrics.condition_numbers(record)
    last = frame[frame["step"] == f"step {kappa.index[-1]}"].set_index("site")["kappa"]
    assert len(last) == 7
    for site in kappa:
        assert last[site] == kappa[site].dropna().iloc[-1]
    first = frame[frame["step"] == "step 0"].set_index("site")["kappa"]
    assert first.to_dict() == kappa.loc[0].to_dict()


def test_the_spectra_are_the_stored_eigenvalues(record):
    frame = conditioning.SPECTRA.prepare(record, ("4/input",))
    steps, values = metrics.spectra(record)["4/input"]
    name = f"4/input, step {steps[-1]}"
    assert frame["curve"].iloc[0] == name
    assert frame.loc[frame["curve"] == name, "eigenvalue"].to_numpy() == pytest.approx(values[-1])


def test_the_map_holds_the_stored_correlations_of_the_layer_named(record):
    frame = conditioning.CORRELATIONS.prepare(record, ("4/input",))
    assert set(frame["layer"]) == {"4/input"}
    expected = metrics.correlation(record, "4/input")
    assert frame["correlation"].to_numpy() == pytest.approx(expected.ravel())
    assert frame[["other", "feature"]].to_numpy().tolist() == [[i, j] for i in range(8) for j in range(8)]
    ax = draw(conditioning.CORRELATIONS, frame)
    [mesh] = ax.collections
    assert np.asarray(mesh.get_array()).reshape(8, 8) == pytest.approx(expected)
    assert mesh.get_clim() == (-1, 1)
    assert ax.yaxis_inverted()


def test_the_map_shows_the_most_correlated_layer_and_at_most_so_many_features():
    store = Store(None, "run", {})
    for site, width, off in (("a/input", 6, 0.9), ("b/input", 300, 0.2), ("c/input", 2, np.nan)):
        store.site(site, {"module": site[0], "slot": "input", "order": 0})
        store.array(0, site, "train", "value", "correlation", np.full((width, width), off).ravel())
    store.commit()
    record = store.record()
    assert set(conditioning.CORRELATIONS.prepare(record, ())["layer"]) == {"a/input"}
    wide = conditioning.CORRELATIONS.prepare(record, ("b/input",))
    assert wide["feature"].nunique() == wide["other"].nunique() == conditioning.MOST_CELLS
    assert (wide["feature"].min(), wide["feature"].max()) == (0, 299)
    assert picture(conditioning.CORRELATIONS, record, ("c/input",)) is None
    told = picture(conditioning.CORRELATIONS, record, ())
    assert told["curves"][0]["z"] == [[0.9] * 6] * 6
    assert picture(conditioning.CORRELATIONS, Store(None, "empty", {}).record(), ()) is None


def test_the_page_has_a_section_of_the_subject_with_every_picture(record):
    text = page(record, ns.diagnose(record))
    section = text.partition('<section id="conditioning"')[2].partition("</section>")[0]
    assert [figure.id for figure in FIGURES if f'data-picture="{figure.id}"' not in section] == []
    assert '<a href="#conditioning">Conditioning</a>' in text
