"use strict";
// The table: a heading sorts by its column, once more the other way round. Names sort as people count.
const body = document.querySelector("#rows tbody");
const headings = [...document.querySelectorAll("#rows thead th")];
const names = new Intl.Collator(undefined, { numeric: true });
const key = (row, i) => i ? Number(row.children[i].dataset.key) : row.children[0].textContent.trim();
headings.forEach((heading, i) => heading.querySelector("button").addEventListener("click", () => {
  const descending = i ? heading.ariaSort !== "descending" : heading.ariaSort === "ascending";
  for (const other of headings) other.ariaSort = "none";
  heading.ariaSort = descending ? "descending" : "ascending";
  const order = (a, b) => i ? a - b || 0 : names.compare(a, b);
  const rows = [...body.rows].sort((a, b) => (descending ? -1 : 1) * order(key(a, i), key(b, i)));
  body.append(...rows);
}));
