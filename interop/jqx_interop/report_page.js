"use strict";
// The table of linears: a click on a heading sorts by it, a second one the other way round.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const keyOf = (row, at) => row.cells[at].dataset.key;
  for (const button of table.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const heading = button.parentElement, at = heading.cellIndex;
      const numbers = "numbers" in heading.dataset;
      const before = heading.getAttribute("aria-sort");
      const down = before ? before === "ascending" : numbers;
      const compare = (a, b) =>
        numbers ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true });
      const rows = [...body.rows].sort((a, b) => {
        const x = keyOf(a, at), y = keyOf(b, at);
        if (x === "" || y === "") return (x === "") - (y === ""); // what is missing comes last
        return down ? compare(y, x) : compare(x, y);
      });
      for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...rows);
    });
  }
}
for (const input of document.querySelectorAll("input.filter")) {
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const row of document.getElementById("linears").tBodies[0].rows) {
      row.hidden = !row.cells[0].dataset.key.toLowerCase().includes(wanted);
    }
  });
}
