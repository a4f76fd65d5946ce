"use strict";
// Tables sort by their header buttons: first press, second press, then the original order again.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells]; // the row above, if any, names groups
  heads.forEach((head, column) => {
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const isNumber = original.every((row) => row.cells[column].dataset.value !== undefined);
    const compare = (a, b) =>
      isNumber ? Number(key(a)) - Number(key(b)) : key(a).localeCompare(key(b), "en", { numeric: true });
    // Numbers start with the largest, names with the first of the alphabet.
    const order = isNumber ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
    head.querySelector("button").addEventListener("click", () => {
      const next = order[(order.indexOf(head.getAttribute("aria-sort")) + 1) % order.length];
      const rows = [...original];
      if (next !== "none") rows.sort((a, b) => (next === "ascending" ? compare(a, b) : compare(b, a)));
      heads.forEach((other) => other.setAttribute("aria-sort", other === head ? next : "none"));
      body.append(...rows);
    });
  });
}
// On paper nothing can be unfolded, so all is while it is printed, but for the lists in the cells of tables.
let unfolded = [];
window.addEventListener("beforeprint", () => {
  unfolded = [...document.querySelectorAll("details:not([open], td details)")];
  unfolded.forEach((details) => { details.open = true; });
});
window.addEventListener("afterprint", () => {
  unfolded.forEach((details) => { details.open = false; });
});
