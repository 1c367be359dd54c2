// Selects a chart, and sorts and filters the table of trials.
const charts = document.querySelectorAll(".chart");
document.getElementById("pair")?.addEventListener("change", (event) => {
  charts.forEach((chart, number) => { chart.hidden = number !== event.target.selectedIndex; });
  window.dispatchEvent(new Event("resize"));  // Plotly cannot measure a hidden chart
});

const table = document.querySelector("table.trials");
const body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells];
const value = (row, column) => {
  const cell = row.cells[column];
  const text = cell.dataset.v ?? cell.textContent;
  return text === "" ? NaN : isNaN(text) ? text.toLowerCase() : Number(text);
};
const compare = (a, b) => {
  if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
};
heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
  const descending = head.getAttribute("aria-sort") === "ascending";
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a, column), value(b, column)];
    const missing = Number.isNaN(x) || Number.isNaN(y);  // unmeasured values stay last
    return descending && !missing ? compare(y, x) : compare(x, y);
  });
  body.append(...rows);
}));

const words = document.getElementById("words");
const feasibleOnly = document.getElementById("feasible");
const filter = () => {
  const terms = words.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of body.rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = (feasibleOnly.checked && row.className === "infeasible") || !terms.every((term) => text.includes(term));
  }
};
words.addEventListener("input", filter);
feasibleOnly.addEventListener("change", filter);
