// The table of layers: sorted by a click on a column's name, filtered by words.

const table = byId("layer-table");

function sortBy(header) {
  const column = header.cellIndex;
  const descending = header.ariaSort === "ascending";
  for (const other of table.tHead.rows[0].cells) other.ariaSort = "none";
  header.ariaSort = descending ? "descending" : "ascending";
  const key = (row) => {
    const { dataset, textContent } = row.cells[column];
    return "value" in dataset ? Number(dataset.value === "inf" ? Infinity : dataset.value) : textContent.trim();
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
  const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
  rows.sort(([a], [b]) => (descending ? compare(b, a) : compare(a, b)));
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

function filterBy(text) {
  const wanted = text.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...table.tBodies[0].rows];
  for (const row of rows) row.hidden = !wanted.every((word) => row.textContent.toLowerCase().includes(word));
  const left = rows.filter((row) => !row.hidden).length;
  byId("shown").textContent = left === rows.length ? `${left} layers` : `${left} of ${rows.length} layers`;
}

if (table) {
  for (const button of table.querySelectorAll("thead button")) {
    button.addEventListener("click", () => sortBy(button.closest("th")));
  }
  const frame = table.parentElement;
  new ResizeObserver(() => (byId("sideways").hidden = frame.scrollWidth <= frame.clientWidth)).observe(frame);
  byId("filter").addEventListener("input", (event) => filterBy(event.target.value));
}
