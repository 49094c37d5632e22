"""The page in a real browser."""

import time

import numpy as np
import pytest

from normscope.core.store import Store
from normscope.report import write_report
from tests.report.records import HOSTILE, Run, findings_of

PLOTS = "return [...document.querySelectorAll('.js-plotly-plot')]"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    record = Run(24, 60).record()
    return write_report(record, findings_of(record), tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def opened(browser, page):
    browser.emulate(prefers_color_scheme="light")
    browser.open(page)
    return browser


def test_it_draws_every_picture_and_the_explorer_without_errors_or_requests(opened, page):
    shown = opened.run("return document.querySelectorAll('figure[data-picture]').length")
    traces = opened.run(f"{PLOTS}.map((e) => e.data.length)")
    assert shown >= 12
    assert len(traces) == shown + 2
    assert min(traces) > 0
    assert opened.run("return typeof Plotly.version") == "string"
    assert opened.errors() == []
    assert opened.requests() == [page.resolve().as_uri()]
    assert opened.run("return performance.getEntriesByType('resource').map((e) => e.name)") == []


def test_it_shows_the_findings_worst_first(opened):
    record = Run(24, 60).record()
    text = opened.run("return document.querySelector('#findings').innerText")
    places = [text.index(f.message) for f in findings_of(record) if f.verdict.value != "ok"]
    words = opened.run(
        "return [...document.querySelectorAll('.finding h3 .verdict')].map((e) => e.textContent.slice(2))"
    )
    assert len(places) == 13
    assert words == sorted(words, key=["failure", "warning", "undecided", "note"].index)


def test_it_draws_only_what_is_near_and_reads_plotly_after_the_first_view(browser, page):
    browser.emulate()
    browser.open(page, until="")
    browser.driver.set_script_timeout(20)
    browser.driver.execute_async_script(
        """
        const done = arguments[0];
        (function look() { document.querySelector(".plot")._fullLayout ? done() : setTimeout(look, 50); })();
        """
    )
    drawn, every = browser.run(
        "return [document.querySelectorAll('.js-plotly-plot').length, document.querySelectorAll('.plot').length]"
    )
    assert 0 < drawn < every
    assert browser.run("return document.querySelector('#map')._fullLayout === undefined")


@pytest.fixture
def explorer(browser, page):
    browser.emulate()
    browser.open(page, until="#map, #line")
    return browser


def test_the_explorer_shows_what_was_recorded(explorer):
    record = Run(24, 60).record()
    names = explorer.run("return document.querySelector('#map').data[0].y")
    values = explorer.run("return document.querySelector('#map').data[0].customdata[4]")
    broken = explorer.run(
        "return document.querySelector('#map').data[1].z.map((row) => row.filter((v) => v === 1).length)"
    )
    expected = record.series(names[4], "rms").to_numpy()
    assert names == [site for site in record.sites["site"] if site.endswith("/output") and site != "/output"]
    assert values == pytest.approx(expected.tolist(), rel=1e-6)
    assert broken == [int(record.series(name, "rms").isna().sum()) for name in names]
    assert sum(broken) > 0


def test_the_explorer_follows_its_controls(explorer):
    choose = (
        "const e = document.querySelector(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('change'))"
    )
    explorer.run(choose, "#quantity", "running statistics")
    explorer.run(choose, "#layer", "2")
    assert explorer.run("return document.querySelector('#line-title').textContent") == "layer1.1.bn1/running"
    assert explorer.run("return document.querySelector('#line-unit').textContent") == "drift from the batch"
    assert (
        explorer.run("return document.querySelector('#line').data.length") == 4
    )  # two edges of the band, median, layer
    assert not explorer.run("return document.querySelector('#phase').checkVisibility()")  # there is one phase only
    explorer.run("document.querySelector('#log').click()")
    assert explorer.run("return document.querySelector('#line')._fullLayout.yaxis.type") == "linear"
    explorer.run("document.querySelector('[data-site=\"layer1.3.relu1/output\"]').click()")
    assert explorer.run("return document.querySelector('#line-title').textContent") == "layer1.3.relu1/output"
    frame = explorer.run("return document.querySelector('#map').layout.shapes[0].y0")
    assert explorer.run("return document.querySelector('#map').data[0].y")[int(frame + 0.5)] == "layer1.3.relu1/output"
    assert explorer.errors() == []


def test_a_click_on_the_map_selects_the_layer(explorer):
    explorer.run("document.querySelector('#map').emit('plotly_click', { points: [{ pointIndex: [7, 0] }] })")
    assert (
        explorer.run("return document.querySelector('#layer').selectedOptions[0].textContent") == "layer1.1.bn1/output"
    )


def test_the_table_sorts_and_filters(explorer):
    explorer.run("document.querySelectorAll('#layer-table thead button')[7].click()")
    column = "return [...document.querySelectorAll('#layer-table tbody tr')].map((row) => row.cells[7].dataset.value)"
    values = [float(value) for value in explorer.run(column)]
    assert len(values) > 5
    assert values == sorted(values)
    explorer.run(
        "const e = document.querySelector('#filter'); e.value = 'LAYER1 conv'; e.dispatchEvent(new Event('input'))"
    )
    left = explorer.run(
        "return [...document.querySelectorAll('#layer-table tbody tr:not([hidden]) .site')].map((e) => e.textContent)"
    )
    assert left
    assert all("layer1" in name and "conv" in name for name in left)
    assert explorer.run("return document.querySelector('#shown').textContent") == f"{len(left)} of 24 layers"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1400])
def test_it_fits_the_window_in_both_schemes(browser, page, width, scheme):
    browser.emulate(width, prefers_color_scheme=scheme)
    browser.open(page)
    # a phone widens its window to what does not fit, so the width asked for is compared
    assert browser.run("return document.documentElement.scrollWidth") <= width
    parts = "return [...document.querySelectorAll('.plot, #map, #line, select')]"
    assert max(browser.run(f"{parts}.map((e) => e.getBoundingClientRect().right)")) <= width
    ink, ground = browser.run("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
    assert contrast(ink, ground) > 7
    label = browser.run("return getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    assert contrast(label, ground) > 4.5
    assert browser.errors() == []


def contrast(first, second):
    """Contrast by WCAG of two colors as rgb(r, g, b)."""
    light = []
    for color in (first, second):
        parts = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_it_draws_a_map_of_correlations(browser, tmp_path):
    store = Store(None, "correlated", {})
    store.site("<b>fc</b>/input", {"module": "<b>fc</b>", "slot": "input", "order": 0})
    found = [[1.0, -0.5, float("nan")], [-0.5, 1.0, float("nan")], [float("nan")] * 3]
    store.array(0, "<b>fc</b>/input", "train", "value", "correlation", np.array(found).ravel())
    store.commit()
    browser.emulate()
    browser.open(write_report(store.record(), [], tmp_path / "report.html"))
    plot = "document.querySelector('[data-picture=\"conditioning.correlations\"] .plot')"
    kind, z = browser.run(f"return [{plot}.data[0].type, {plot}.data[0].z]")
    assert kind == "heatmap"
    assert z == [[1, -0.5, None], [-0.5, 1, None], [None] * 3]
    bottom, top = browser.run(f"return {plot}._fullLayout.yaxis.range")
    assert bottom > top
    assert browser.run("return document.querySelector('figure .legend').textContent").strip() == "<b>fc</b>/input"
    told = browser.point_at("[data-picture='conditioning.correlations'] .nsewdrag", 0.5, 0.17)
    assert told == "<b>fc</b>/input1, 0: -0.500"
    assert browser.errors() == []


def test_names_stay_text_in_the_page_and_in_plotly(browser, tmp_path):
    record = Run(12, 20).rename(*HOSTILE).record()
    path = write_report(record, findings_of(record), tmp_path / "report.html")
    browser.emulate()
    browser.open(path, until="#map, #line")
    assert browser.run("return document.querySelectorAll('img[onerror], main script').length") == 0
    assert browser.run("return [...document.scripts].filter((s) => s.textContent.startsWith('alert')).length") == 0
    links = browser.run("return [...document.querySelectorAll('#layer-table .site')].map((e) => e.textContent)")
    assert links[:3] == [f"{name}/output" for name in HOSTILE]
    options = browser.run("return [...document.querySelectorAll('#layer option')].map((e) => e.textContent)")
    assert options[:3] == links[:3]
    ticks = browser.run("return [...document.querySelectorAll('#map .ytick text')].map((e) => e.textContent)")
    assert ticks[0] == links[0]
    assert ticks[1].startswith("</script><img")
    for row in range(3):
        assert browser.point_at("#map .nsewdrag", 0.3, (row + 0.5) / 12).startswith(links[row])
    assert browser.errors() == []
    assert browser.requests() == [path.resolve().as_uri()]


def test_printing_draws_everything_on_white(browser, page):
    browser.emulate(prefers_color_scheme="dark")
    browser.open(page, until="")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("return [...document.querySelectorAll('.plot, #map')].every((e) => e._fullLayout)")
    assert contrast(browser.run("return getComputedStyle(document.body).backgroundColor"), "rgb(255, 255, 255)") < 1.1
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert contrast(browser.run("return getComputedStyle(document.body).backgroundColor"), "rgb(255, 255, 255)") > 10
    assert browser.errors() == []


def test_a_record_of_nothing_and_one_of_a_single_step_open(browser, tmp_path):
    browser.emulate()
    empty = write_report(Store(None, "empty", {}).record(), [], tmp_path / "empty.html")
    browser.open(empty)
    assert "No findings" in browser.run("return document.body.innerText")
    assert browser.errors() == []
    single = Run(6, 1).record()
    browser.open(write_report(single, findings_of(single), tmp_path / "single.html"))
    assert browser.run("return document.querySelector('#map').data[0].z.length") == 6
    assert browser.errors() == []


def test_the_first_view_of_a_long_run_comes_within_a_second(browser, tmp_path):
    record = Run(60, 500).record()
    path = write_report(record, findings_of(record), tmp_path / "report.html")
    browser.emulate()
    paints = []
    for _ in range(3):
        browser.open(path, until="")
        entry = "return performance.getEntriesByName('first-contentful-paint').map((e) => e.startTime)[0] ?? null"
        deadline = time.monotonic() + 5
        while (paint := browser.run(entry)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        paints.append(paint)
    print(f"first contentful paint: {sorted(round(paint) for paint in paints)} ms")
    assert min(paints) < 1000
