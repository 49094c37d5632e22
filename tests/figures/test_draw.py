"""What is on the axes, compared with the frame."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure as Canvas

from normscope.core.figure import Figure
from normscope.figures import FIGURES
from normscope.figures.draw import FLOOR, draw, draw_spectrum
from normscope.figures.palette import CURVES, REFERENCE, RULE
from tests.report.records import Run, findings_of

TOY = Figure(
    id="toy.curves",
    title="Toy",
    explains=(),
    prepare=lambda record, sites: pd.DataFrame(),
    columns=("step", "value", "curve"),
    x_label="step",
    y_label="value",
    log_y=True,
    references=("expected",),
    rules=("skipped",),
)
FRAME = pd.DataFrame({
    "step": [0, 1, 2, 0, 1, 2, 0, 2, 1, 2],
    "value": [1.0, 2.0, 4.0, 3.0, np.nan, 1.0, 2.0, 2.0, np.nan, np.nan],
    "curve": ["_a$x$_"] * 3 + ["b"] * 3 + ["expected"] * 2 + ["skipped"] * 2,
})


def test_artists_hold_the_frame():
    ax = draw(TOY, FRAME)
    first, second, expected = ax.get_lines()
    assert first.get_xydata().tolist() == [[0, 1], [1, 2], [2, 4]]
    assert second.get_ydata() == pytest.approx([3, np.nan, 1], nan_ok=True)
    assert (first.get_color(), second.get_color(), expected.get_color()) == (*CURVES[:2], REFERENCE)
    assert expected.get_linestyle() == "--"
    [rules] = ax.collections
    assert [segment[:, 0].tolist() for segment in rules.get_segments()] == [[1, 1], [2, 2]]
    assert to_hex(rules.get_color()[0]) == RULE
    assert (ax.get_yscale(), ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left")) == (
        "log",
        "step",
        "value",
        "Toy",
    )


def test_names_are_not_markup_and_none_is_left_out():
    texts = draw(TOY, FRAME).get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["_a$x$_", "b", "expected", "skipped"]
    assert not any(text.get_parse_math() for text in texts)


def test_it_draws_where_it_is_told():
    ax = Canvas().subplots()
    assert draw(TOY, FRAME, ax) is ax


def test_an_empty_frame_gives_empty_axes():
    ax = draw(TOY, FRAME.iloc[:0])
    assert len(ax.get_lines()) == len(ax.collections) == 0
    assert ax.get_legend() is None


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.id)
def test_every_figure_can_be_drawn_and_saved(figure, tmp_path):
    record = Run(12, 20).record()
    sites = next((f.sites for f in findings_of(record) if f.id in figure.explains and f.sites), ())
    frame = figure.prepare(record, sites)
    ax = draw(figure, frame)
    ax.figure.savefig(tmp_path / "figure.png", dpi=40)
    names = list(frame[figure.columns[2]].unique())
    assert len(ax.get_lines()) + len(ax.collections) == len(names)
    for line, name in zip(ax.get_lines(), [n for n in names if n not in figure.rules], strict=True):
        part = frame[frame[figure.columns[2]] == name]
        assert line.get_ydata() == pytest.approx(part[figure.columns[1]].to_numpy(float), nan_ok=True)


class Gaussian:
    exact = True

    def grid(self, points=1000):
        return np.linspace(-5, 20, points)

    def density(self):
        return np.exp(-0.5 * self.grid() ** 2) / np.sqrt(2 * np.pi)


def test_a_spectrum_is_drawn_on_a_logarithmic_axis_down_to_a_floor():
    ax = draw_spectrum(Gaussian(), name="Hessian")
    (line, zero) = ax.get_lines()
    x, y = line.get_data()
    assert ax.get_yscale() == "log"
    assert x == pytest.approx(Gaussian().grid())
    assert y == pytest.approx(np.maximum(Gaussian().density(), FLOOR))
    assert set(zero.get_xdata()) == {0.0}
    assert "Hessian" in ax.get_xlabel()
    assert "exact" in ax.get_ylabel()


@pytest.mark.parametrize("tensors", [["a"], ["a", "b"]])
def test_cells_cover_the_axes_also_where_there_is_one_row(tensors):
    rows = [(step, tensor, "spike", 0.5) for tensor in tensors for step in (3, 4, 6)]
    columns = ("step", "tensor", "spike", "moved")
    toy = Figure(
        id="toy.map",
        title="Toy",
        explains=(),
        prepare=lambda record, sites: pd.DataFrame(),
        columns=columns,
        x_label="step",
        y_label="tensor",
        mark="cell",
    )
    (mesh,) = draw(toy, pd.DataFrame(rows, columns=columns)).collections
    corners = mesh.get_coordinates()
    assert corners[0, :, 0].tolist() == [2.5, 3.5, 5.0, 7.0]
    assert corners[:, 0, 1].tolist() == [edge - 0.5 for edge in range(len(tensors) + 1)]
