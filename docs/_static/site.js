// Draws the charts of lessons, and lets the table of results be sorted and filtered.
"use strict";

for (const script of document.querySelectorAll("script.chart")) {
  const box = document.createElement("div");
  script.replaceWith(box);
  vegaEmbed(box, JSON.parse(script.textContent), { mode: "vega-lite" });
}

/** The number that a cell starts with, or its text. */
const value = (row, i) => {
  const text = row.cells[i].textContent;
  const number = parseFloat(text);
  return Number.isNaN(number) ? text : number;
};

/** Numbers by size, texts by alphabet, numbers before texts; an empty cell comes last in both directions. */
const compare = (x, y, sign) => {
  if (x === "" || y === "") return (x === "") - (y === "");
  if (typeof x !== typeof y) return typeof x === "number" ? -sign : sign;
  return sign * (typeof x === "number" ? x - y : x.localeCompare(y));
};

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => compare(value(a, i), value(b, i), sign)));
    });
    head.append(button);
  });

  const filter = document.createElement("input");
  filter.type = "search";
  filter.className = "filter";
  filter.placeholder = filter.ariaLabel = "Words that a row must hold, such as: W3A3 resnet20";
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    for (const row of body.rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  });
  (table.closest(".pst-scrollable-table-container") ?? table).before(filter);
}
