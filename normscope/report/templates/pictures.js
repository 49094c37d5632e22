// Pictures of findings and of the training: curves as the figures prepared them.

/** Values of a logarithmic axis: what is not positive has no place on it. */
const placed = (values, log) => (log ? values.map((value) => (value > 0 ? value : null)) : values);

function curveTrace(curve, picture) {
  if (curve.kind === "rule") return ruleTrace(curve.x, curve.name, curve.color ? "dot" : "solid");
  const reference = curve.kind === "reference";
  const y = placed(curve.y, picture.log);
  const few = y.filter((value) => value !== null).length < 20;
  const points = picture.mark === "point" && !reference;
  const ink = reference ? color("reference") : color(`curve-${curve.color}`);
  const label = curve.text.length ? "%{text}" : escaped(curve.name);
  return {
    x: curve.x,
    y,
    text: curve.text.map(escaped),
    mode: points ? "markers" : few && !reference ? "lines+markers" : "lines",
    line: { color: ink, width: reference ? 1.6 : 2, dash: reference ? "dash" : "solid" },
    marker: { color: ink, size: points ? 6 : 5 },
    hovertemplate: `${label}<br>${escaped(axisWord(picture.x))} %{x}: %{y:.4~g}<extra></extra>`,
  };
}

/** A map of values from -1 to 1. */
function cellTrace(cells) {
  return {
    type: "heatmap",
    x: cells.x,
    y: cells.y.map((name) => (typeof name === "string" ? escaped(name) : name)),
    z: cells.z,
    zmin: -1,
    zmax: 1,
    colorscale: SCALES.signed,
    colorbar: { thickness: 12, outlinewidth: 0, tickfont: { size: 11, color: color("soft") } },
    hovertemplate: `${escaped(cells.name)}<br>%{x}, %{y}: %{z:.3f}<extra></extra>`,
  };
}

/** The axis of a map's rows: the first on top, names shortened beside it. */
function rowsOf(rows) {
  const named = typeof rows[0] === "string";
  const short = (name) => (name.length > 24 ? `${name.slice(0, 8)}…${name.slice(-15)}` : name); // block and tensor
  const names = named ? { type: "category", tickvals: rows.map(escaped), ticktext: rows.map((name) => escaped(short(name))) } : {};
  return { showgrid: false, autorange: "reversed", ...names };
}

/** What a position is called when hovering: "comparable layer" of "comparable layer, in order of execution". */
const axisWord = (label) => label.split(",")[0];

function makePicture(picture) {
  return () => {
    if (picture.mark === "cell") {
      return {
        traces: picture.curves.map(cellTrace),
        layout: layoutOf({ xaxis: axis(picture.x, { showgrid: false }), yaxis: axis("", rowsOf(picture.curves[0].y)) }),
      };
    }
    const last = (curve) => (curve.kind === "measured" ? 1 : 0);
    const ordered = [...picture.curves].sort((a, b) => last(a) - last(b));
    return {
      traces: ordered.map((curve) => curveTrace(curve, picture)),
      layout: layoutOf({
        xaxis: axis(picture.x, { showgrid: false }),
        yaxis: axis("", picture.log ? logarithmic(picture.curves.flatMap((curve) => curve.y)) : linear()),
        yaxis2: ruleAxis,
      }),
    };
  };
}

for (const figure of document.querySelectorAll("[data-picture]")) {
  const element = figure.querySelector(".plot");
  whenNear(element, () => draw(element, makePicture(facts.pictures[figure.dataset.picture])));
}
