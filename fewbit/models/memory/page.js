"use strict";
// Headings become buttons that sort their table. The page is complete without this script.
for (const heading of document.querySelectorAll("table th[scope=col]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = heading.textContent;
  button.title = "sort by this column";
  button.addEventListener("click", () => sort(heading));
  heading.replaceChildren(button);
}

function sort(heading) {
  const table = heading.closest("table"), body = table.tBodies[0];
  const column = heading.cellIndex, numbers = heading.classList.contains("number");
  const ascending = heading.ariaSort ? heading.ariaSort === "descending" : !numbers;
  const value = (row) => {
    const cell = row.cells[column];
    return numbers ? Number(cell.dataset.number) : cell.textContent;
  };
  const collator = new Intl.Collator("en", { numeric: true });
  const compare = numbers ? (a, b) => value(a) - value(b) : (a, b) => collator.compare(value(a), value(b));
  const rows = [...body.rows].sort(compare);
  body.append(...(ascending ? rows : rows.reverse()));
  for (const other of table.querySelectorAll("th[scope=col]")) other.removeAttribute("aria-sort");
  heading.ariaSort = ascending ? "ascending" : "descending";
}
