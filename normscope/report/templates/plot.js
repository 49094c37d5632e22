// What all pictures share: colors of the theme, text that is not markup, and plotly, which stays inert text until needed.

const byId = (id) => document.getElementById(id);
const facts = JSON.parse(byId("facts").textContent);
const CONFIG = { displayModeBar: false, responsive: true, showLink: false, doubleClick: "reset" };
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif";
const SCALES = {
  sequential: "Viridis",
  signed: [
    [0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1, "#b2182b"],
  ],
};
const coarse = matchMedia("(pointer: coarse)");

/** Color of the theme, by the name of its custom property. */
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** Plotly reads a subset of HTML in labels: names of layers are escaped for it. */
const escaped = (text) =>
  text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`).replace(/[\u0000-\u001f\u007f-\u009f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g, "\ufffd");

/** Shorten a name in its middle, where paths differ least. */
const shortened = (text, most) =>
  text.length <= most ? text : `${text.slice(0, Math.ceil(most / 2) - 1)}…${text.slice(-Math.floor(most / 2))}`;

/** The last parts of a name, as many as fit; of an output without the word. */
function ending(text, most) {
  const name = text.replace(/(?<=.)\/output$/, "");
  if (name.length <= most) return name;
  const parts = name.split(".");
  let kept = parts.pop();
  while (parts.length && kept.length + parts.at(-1).length + 2 <= most) kept = `${parts.pop()}.${kept}`;
  return kept.length < most ? `…${kept}` : shortened(kept, most);
}

/** A number with four significant digits. */
function format(value) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : "NaN or ∞";
  const size = Math.abs(value);
  const rounded = Number(value.toPrecision(4));
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return rounded.toExponential().replace("e+", "e");
  return Number.isInteger(value) ? value.toLocaleString("en-US") : String(rounded);
}

function loadPlotly() {
  if (window.Plotly) return;
  const code = document.createElement("script");
  code.textContent = byId("plotly").textContent.replaceAll("\ue000", "");
  document.head.append(code);
}

const drawn = new Map(); // element -> function that makes its traces and layout

function draw(element, make) {
  loadPlotly();
  drawn.set(element, make);
  const { traces, layout } = make(element.clientWidth);
  Plotly.react(element, traces, layout, CONFIG);
}

function redraw() {
  for (const [element, make] of drawn) draw(element, make);
}

/** Draw when the element comes near the window, one picture in each idle moment. */
const waiting = new Map();
const idle = window.requestIdleCallback ?? ((work) => setTimeout(work, 20));
const observer = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting || !waiting.has(target)) continue;
      observer.unobserve(target);
      idle(() => start(target), { timeout: 400 });
    }
  },
  { rootMargin: "500px 0px" },
);

function start(element) {
  const begin = waiting.get(element);
  waiting.delete(element);
  if (begin) begin();
}

function whenNear(element, begin) {
  waiting.set(element, begin);
  observer.observe(element);
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("beforeprint", () => {
  document.documentElement.dataset.print = "";
  for (const element of [...waiting.keys()]) start(element);
  redraw();
});
addEventListener("afterprint", () => {
  delete document.documentElement.dataset.print;
  redraw();
});

/** Axis in the theme's colors; what the y axis measures is written above the picture. */
function axis(title, more = {}) {
  return {
    ...(title ? { title: { text: title, font: { size: 12, color: color("soft") }, standoff: 6 } } : {}),
    tickfont: { size: 11, color: color("soft") },
    gridcolor: color("line"),
    linecolor: color("line"),
    zeroline: false,
    automargin: true,
    ...more,
  };
}

const STEPS_OF_A_DECADE = [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7], Array.from({ length: 90 }, (_, i) => 1 + i / 10)];

/** Logarithmic axis for values, labeled at three to seven round numbers. */
function logarithmic(values) {
  const positive = values.filter((value) => value > 0);
  const low = positive.reduce((a, b) => Math.min(a, b), Infinity);
  const high = positive.reduce((a, b) => Math.max(a, b), 0);
  let ticks = [];
  for (const steps of STEPS_OF_A_DECADE) {
    ticks = [];
    for (let k = Math.floor(Math.log10(low)); k <= Math.log10(high); k++) {
      ticks.push(...steps.map((step) => Number(`${step}e${k}`)).filter((tick) => tick >= low / 1.1 && tick <= high * 1.1));
    }
    if (ticks.length > 2) break;
  }
  const every = Math.ceil(ticks.length / 7);
  ticks = ticks.filter((_, i) => i % every === 0);
  return { type: "log", tickvals: ticks, ticktext: ticks.map(format) };
}

const linear = (more) => ({ nticks: 6, rangemode: "tozero", ...more });

function layoutOf(more) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: FONT, size: 12, color: color("ink") },
    margin: { l: 8, r: 8, t: 8, b: 8 },
    showlegend: false,
    hovermode: "closest",
    hoverlabel: {
      bgcolor: color("panel"),
      bordercolor: color("line"),
      font: { family: FONT, size: 12, color: color("ink") },
      align: "left",
      namelength: -1,
    },
    dragmode: coarse.matches ? false : "zoom",
    ...more,
  };
}

/** Vertical lines at places on the x axis, drawn on an axis of their own from the bottom to the top. */
function ruleTrace(places, name, dash) {
  return {
    x: places.flatMap((place) => [place, place, place, null]),
    y: places.flatMap(() => [0, 0.5, 1, null]),
    yaxis: "y2",
    mode: "lines",
    line: { color: color("rule"), width: 1.3, dash },
    hovertemplate: `${escaped(name)}<br>%{x}<extra></extra>`,
  };
}

const ruleAxis = { overlaying: "y", range: [0, 1], visible: false, fixedrange: true };
