// The explorer: one statistic of all layers over all steps as a map, and one layer of it as a line.

const ROW = 13; // height of a row of the map
const control = Object.fromEntries(["quantity", "stat", "phase", "layer", "log"].map((id) => [id, byId(id)]));
const decoded = new Map();
let shown = null; // the map on display
let chosen = 0; // row of the layer on display

/** Numbers of one statistic, decoded when first asked for: base64 of little-endian float32. */
function numbers(key) {
  if (!decoded.has(key)) {
    const text = atob(byId(key).textContent);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    decoded.set(key, new Float32Array(bytes.buffer));
  }
  return decoded.get(key);
}

/** One row of a matrix that was stored row by row. */
const rowOf = (values, row, width) => Array.from(values.subarray(row * width, (row + 1) * width));

function valuesOf(map, row) {
  const steps = facts.axes[map.axis];
  return map.constant === null ? rowOf(numbers(map.data), row, steps.length) : steps.map(() => map.constant);
}

/** Of each pair of columns the value that is farther from the row's median: what is unusual stays visible. */
function merged(values) {
  const finite = values.filter(Number.isFinite).sort((a, b) => a - b);
  const median = finite.length ? finite[finite.length >> 1] : 0;
  const distance = (value) => {
    if (Number.isNaN(value)) return -1;
    return value > 0 && median > 0 ? Math.abs(Math.log(value / median)) : Math.abs(value - median);
  };
  const result = [];
  for (let i = 0; i < values.length; i += 2) {
    result.push(distance(values[i]) >= distance(values[i + 1]) ? values[i] : values[i + 1]);
  }
  return result;
}

const siteOf = (map, row) => facts.sites[map.rows[row]];

// ---- choosing ---------------------------------------------------------------------------------------------------------

function fill(select, options, value) {
  select.replaceChildren(...options.map(([key, label]) => new Option(label, key, false, key === value)));
  select.closest("label").hidden = options.length < 2 && select !== control.layer;
}

const distinct = (items) => [...new Map(items)];

/** Show a map: the selects offer what the record holds for its quantity and statistic. */
function choose(map, site) {
  shown = map;
  const alike = facts.maps.filter((other) => other.quantity === map.quantity);
  const phases = alike.filter((other) => other.stat === map.stat);
  fill(control.quantity, distinct(facts.maps.map((other) => [other.quantity, other.quantity])), map.quantity);
  fill(control.stat, distinct(alike.map((other) => [other.stat, other.words])), map.stat);
  fill(control.phase, phases.map((other) => [other.phase, facts.phases[other.phase]]), map.phase);
  fill(control.layer, map.rows.map((index, row) => [String(row), facts.sites[index]]), "");
  control.log.disabled = map.scale === "signed";
  control.log.checked = map.scale === "log";
  const row = map.rows.indexOf(facts.sites.indexOf(site));
  select(row >= 0 ? row : Math.min(chosen, map.rows.length - 1));
}

/** Show one layer, on the map as a frame and below it as a line. */
function select(row) {
  chosen = row;
  control.layer.value = String(row);
  byId("line-title").textContent = siteOf(shown, row);
  byId("line-unit").textContent = shown.words;
  for (const item of document.querySelectorAll("#line-legend [data-band]")) item.hidden = !shown.bands;
  byId("line-legend").hidden = !shown.bands;
  draw(byId("map"), makeMap);
  draw(byId("line"), makeLine);
}

function matching(wanted) {
  const fits = (map) => Object.entries(wanted).every(([key, value]) => map[key] === value);
  return facts.maps.find(fits) ?? facts.maps.find((map) => map.quantity === wanted.quantity);
}

// ---- the map ----------------------------------------------------------------------------------------------------------

function makeMap(width) {
  const map = shown;
  const log = control.log.checked && !control.log.disabled;
  const steps = facts.axes[map.axis];
  const rows = map.rows.map((_, row) => (map.paired ? merged(valuesOf(map, row)) : valuesOf(map, row)));
  const x = map.paired ? steps.filter((_, i) => i % 2 === 0) : steps;
  const names = map.rows.map((index) => escaped(facts.sites[index]));
  const z = rows.map((row) => row.map((value) => cell(value, log)));
  byId("map-note").textContent = note(map, x.length);
  const shared = { type: "heatmap", x, y: names, xgap: 0, ygap: rows.length > 40 ? 0 : 1, hoverongaps: false };
  const traces = [{ ...shared, z, customdata: rows, ...coloring(z, map, log, width), hovertemplate: hover(map, "%{customdata:.4~g}") }];
  const overlays = [
    ["map-broken", (value) => Math.abs(value) === Infinity, "rule", "NaN or infinity"],
    ["map-zero", (value) => log && value === 0, "zero", "exactly 0"],
  ];
  for (const [legend, applies, ink, word] of overlays) {
    const cells = rows.map((row) => row.map((value) => (applies(value) ? 1 : null)));
    const any = cells.some((row) => row.includes(1));
    byId(legend).hidden = !any;
    const solid = [[0, color(ink)], [1, color(ink)]];
    if (any) traces.push({ ...shared, z: cells, colorscale: solid, showscale: false, hovertemplate: hover(map, word) });
  }
  return { traces, layout: mapLayout(map, names, width) };
}

const hover = (map, value) => `%{y}<br>step %{x}: ${escaped(map.words)} ${value}<extra></extra>`;

function cell(value, log) {
  if (!Number.isFinite(value) || (log && value <= 0)) return null;
  return log ? Math.log10(value) : value;
}

function note(map, columns) {
  const thinned = map.paired ? ` Each column is the most unusual of ${Math.ceil(map.samples / columns)} sampled steps.` : "";
  const constant = map.constant === null ? "" : ` It is ${format(map.constant)} everywhere.`;
  return `${map.rows.length} rows in order of execution, ${format(map.samples)} sampled steps.${constant}${thinned} Select a row to see its line.`;
}

function coloring(z, map, log, width) {
  const values = z.flat().filter((value) => value !== null);
  let low = values.reduce((a, b) => Math.min(a, b), Infinity);
  let high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (map.scale === "signed") [low, high] = [-Math.max(-low, high, 1e-30), Math.max(-low, high, 1e-30)];
  if (!(high > low)) [low, high] = [low - 0.5, low + 0.5];
  const narrow = width < 600;
  const ticks = [0, 1, 2, 3, 4].map((i) => low + ((high - low) * i) / 4);
  return {
    zmin: low,
    zmax: high,
    colorscale: map.scale === "signed" ? SCALES.signed : SCALES.sequential,
    colorbar: {
      orientation: narrow ? "h" : "v",
      ...(narrow ? { y: 1, yanchor: "bottom", x: 0.5, ypad: 4 } : { x: 1, xpad: 8 }),
      thickness: 9,
      outlinewidth: 0,
      tickvals: ticks,
      ticktext: ticks.map((value) => format(Number((log ? 10 ** value : value).toPrecision(2)))),
      tickfont: { size: 11, color: color("soft") },
    },
  };
}

/** Title below the x axis, clear of its labels. */
const title = (text) => ({
  text, xref: "paper", yref: "paper", x: 0.5, y: 0, yshift: -22, yanchor: "top", showarrow: false,
  font: { size: 12, color: color("soft") },
});

function mapLayout(map, names, width) {
  const narrow = width < 600;
  const height = Math.min(900, Math.max(120, map.rows.length * ROW)) + 56 + (narrow ? 30 : 0);
  byId("map").style.height = `${height}px`;
  const every = Math.ceil((map.rows.length * 11) / (height - 56)); // labels are 11 pixels high
  const labeled = map.rows.map((_, row) => row).filter((row) => row % every === 0);
  return layoutOf({
    height,
    // beside a horizontal bar of colors plotly puts the title of this axis on its labels
    xaxis: axis(narrow ? "" : "step", { showgrid: false }),
    ...(narrow ? { margin: { l: 8, r: 8, t: 8, b: 40 }, annotations: [title("step")] } : {}),
    yaxis: axis("", {
      type: "category",
      range: [map.rows.length - 0.5, -0.5],
      showgrid: false,
      tickvals: labeled,
      ticktext: labeled.map((row) => escaped(narrow ? ending(facts.sites[map.rows[row]], 22) : shortened(facts.sites[map.rows[row]], 34))),
      tickfont: { size: narrow ? 10 : 10.5, color: color("soft"), family: "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace" },
      fixedrange: coarse.matches,
    }),
    shapes: [
      {
        type: "rect", xref: "paper", x0: 0, x1: 1, y0: chosen - 0.5, y1: chosen + 0.5,
        line: { color: color("ink"), width: 1.5 },
      },
    ],
  });
}

// ---- the line ---------------------------------------------------------------------------------------------------------

function makeLine() {
  const map = shown;
  const log = control.log.checked && !control.log.disabled;
  const values = valuesOf(map, chosen);
  const steps = facts.axes[map.axis];
  const finite = values.map((value) => (Number.isFinite(value) ? value : null));
  const few = finite.length < 20;
  const hovertemplate = "step %{x}: %{y:.4~g}<extra></extra>";
  const traces = [
    ...bandTraces(map, log),
    {
      x: steps, y: placed(finite, log), mode: few ? "lines+markers" : "lines",
      line: { color: color("curve-0"), width: 2 }, marker: { size: 5 }, hovertemplate,
    },
  ];
  const scaled = axis("", log ? logarithmic(traces.flatMap((trace) => trace.y)) : linear(map.scale === "signed" ? { rangemode: "normal" } : {}));
  const broken = steps.filter((_, i) => Math.abs(values[i]) === Infinity);
  if (broken.length) traces.push(ruleTrace(broken.slice(0, 1), "first NaN or infinity", "solid"));
  return {
    traces,
    layout: layoutOf({
      xaxis: axis("step", { showgrid: false }),
      yaxis: scaled,
      yaxis2: ruleAxis,
    }),
  };
}

function bandTraces(map, log) {
  if (!map.bands) return [];
  const steps = facts.axes[map.bands.axis];
  const values = numbers(map.bands.data);
  const plane = map.rows.length * steps.length;
  const [low, middle, high] = [0, 1, 2].map((i) => {
    const row = rowOf(values.subarray(i * plane, (i + 1) * plane), chosen, steps.length);
    return placed(row.map((value) => (Number.isFinite(value) ? value : null)), log);
  });
  const edge = { x: steps, mode: "lines", line: { width: 0 }, hoverinfo: "skip", connectgaps: false };
  return [
    { ...edge, y: high },
    { ...edge, y: low, fill: "tonexty", fillcolor: `${color("curve-0")}38` },
    {
      x: steps, y: middle, mode: "lines", line: { color: color("reference"), width: 1.6, dash: "dash" },
      hovertemplate: "median channel<br>step %{x}: %{y:.4~g}<extra></extra>",
    },
  ];
}

// ---- beginning --------------------------------------------------------------------------------------------------------

if (facts.maps.length) {
  const pick = () => ({ quantity: control.quantity.value, stat: control.stat.value, phase: control.phase.value });
  const keep = () => siteOf(shown, chosen);
  control.quantity.addEventListener("change", () => choose(matching({ quantity: control.quantity.value }), keep()));
  control.stat.addEventListener("change", () => {
    const { quantity, stat, phase } = pick();
    choose(facts.maps.find((m) => m.quantity === quantity && m.stat === stat && m.phase === phase) ?? matching({ quantity, stat }), keep());
  });
  control.phase.addEventListener("change", () => choose(matching(pick()), keep()));
  control.layer.addEventListener("change", () => select(Number(control.layer.value)));
  control.log.addEventListener("change", () => select(chosen));
  byId("controls").addEventListener("submit", (event) => event.preventDefault());

  let ready = false;
  const open = (map, site) => {
    waiting.delete(byId("map"));
    choose(map, site);
    if (!ready) byId("map").on("plotly_click", ({ points }) => select(points[0].pointIndex[0]));
    ready = true;
  };
  whenNear(byId("map"), () => open(facts.maps[0], siteOf(facts.maps[0], 0)));

  /** A link to a layer opens it in the map that is on display, or in the first that has it. */
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("[data-site]");
    if (!link) return;
    const index = facts.sites.indexOf(link.dataset.site);
    const holds = (map) => map?.rows.includes(index);
    const map = holds(shown) ? shown : facts.maps.find(holds);
    if (map) open(map, link.dataset.site);
  });
}
