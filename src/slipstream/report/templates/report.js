"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const store = document.getElementById("plots");
  const plots = store ? JSON.parse(store.textContent) : {};
  const config = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };

  for (const [id, plot] of Object.entries(plots)) Plotly.newPlot(id, plot.traces, plot.layout, config);

  const hide = (arch, hidden) => {
    for (const [id, plot] of Object.entries(plots)) {
      const at = plot.traces.flatMap((trace, i) => (trace.name === arch ? [i] : []));
      if (at.length) Plotly.restyle(id, { visible: !hidden }, at);
    }
    for (const button of all(".legend button")) {
      if (button.dataset.arch === arch) button.setAttribute("aria-pressed", String(!hidden));
    }
  };
  for (const button of all(".legend button")) {
    button.addEventListener("click", () => hide(button.dataset.arch, button.getAttribute("aria-pressed") === "true"));
  }

  const paper = { width: 325, height: 250 };
  window.addEventListener("beforeprint", () => { for (const id of Object.keys(plots)) Plotly.relayout(id, paper); });
  window.addEventListener("afterprint", () => { for (const id of Object.keys(plots)) Plotly.relayout(id, { width: null, height: null, autosize: true }); });

  const table = document.querySelector("table.numbers");
  const key = (row, column) => {
    const cell = row.cells[column];
    return column === 0 ? cell.textContent.trim() : cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  const compare = (a, b, sign) => (a === null ? (b === null ? 0 : 1) : b === null ? -1 : sign * (a < b ? -1 : a > b ? 1 : 0));
  const sort = (head) => {
    const before = head.getAttribute("aria-sort");
    const first = head.dataset.lower === "0" ? "descending" : "ascending";
    const order = before === null ? first : before === "ascending" ? "descending" : "ascending";
    for (const other of all("th[aria-sort]", table)) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const rows = all("tbody tr", table).sort((a, b) => compare(key(a, head.cellIndex), key(b, head.cellIndex), sign));
    table.tBodies[0].append(...rows);
  };
  if (table) for (const head of all("thead th", table)) head.querySelector("button").addEventListener("click", () => sort(head));
})();
