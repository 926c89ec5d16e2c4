"use strict";
// What moves in a report: live charts, a key that switches orderings off everywhere, tables that sort and filter.
(() => {
  const root = document.documentElement;
  root.classList.add("scripted");
  const hidden = new Map(); // ordering: its number in the study
  const charts = [];

  // One tip for charts and for the cells of matrices.
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;
  document.body.append(tip);
  function place(x, y) {
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - box.width - 4))}px`;
    tip.style.top = `${y + 16 + box.height > innerHeight ? Math.max(4, y - box.height - 10) : y + 16}px`;
  }
  function tell(event, value) {
    tip.replaceChildren();
    if (value && typeof value === "object") {
      const table = document.createElement("table");
      for (const [name, found] of Object.entries(value)) {
        const row = table.insertRow();
        row.insertCell().textContent = name;
        row.insertCell().textContent = found;
      }
      tip.append(table);
    } else {
      tip.textContent = value;
    }
    place(event.clientX, event.clientY);
  }
  const quiet = () => { tip.hidden = true; };

  async function draw(figure) {
    figure.classList.add("live");
    const spec = JSON.parse(figure.querySelector("script").textContent);
    spec.description = figure.dataset.says;
    const switched = (spec.params || []).some((param) => param.name === "hidden");
    try {
      const { view } = await vegaEmbed(figure.querySelector(".chart"), spec, {
        mode: "vega-lite", renderer: "svg", actions: false, defaultStyle: false, logLevel: 0,
        tooltip: (_, event, item, value) => (value == null || value === "" ? quiet() : tell(event, value)),
      });
      if (switched) {
        charts.push(view);
        if (hidden.size) await view.signal("hidden", [...hidden.keys()]).runAsync();
      }
    } catch (error) {
      figure.classList.remove("live"); // the drawing stays
    }
  }
  const figures = [...document.querySelectorAll("figure[data-says]")];
  async function drawAll() {
    for (const figure of figures) await draw(figure);
    root.dataset.ready = "yes";
  }
  if (window.vegaEmbed) {
    drawAll();
  } else {
    root.dataset.ready = "yes";
  }

  // The key: an ordering is shown or hidden in all charts, tables and matrices.
  const rules = document.createElement("style");
  document.head.append(rules);
  const key = document.querySelector(".key");
  const buttons = key ? [...key.querySelectorAll("button[data-ordering]")] : [];
  function apply() {
    for (const view of charts) view.signal("hidden", [...hidden.keys()]).runAsync();
    rules.textContent = [...hidden.values()]
      .map((number) => `.matrix .o-${number}, table:not(.matrix) tr:has(> td.o-${number}) { display: none }`)
      .join("\n");
    for (const button of buttons) button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.ordering)));
  }
  for (const button of buttons) {
    const { ordering, number } = button.dataset;
    button.addEventListener("click", () => {
      if (!hidden.delete(ordering)) hidden.set(ordering, number);
      apply();
    });
    button.addEventListener("dblclick", () => {
      for (const other of buttons) hidden.set(other.dataset.ordering, other.dataset.number);
      hidden.delete(ordering);
      apply();
    });
    for (const cell of document.querySelectorAll(`table:not(.matrix) td.o-${number}`)) {
      cell.prepend(button.querySelector(".glyph").cloneNode(true));
    }
  }
  key?.querySelector(".all")?.addEventListener("click", () => { hidden.clear(); apply(); });

  for (const cell of document.querySelectorAll(".matrix td[title]")) {
    cell.dataset.says = cell.title;
    cell.setAttribute("aria-label", cell.title);
    cell.removeAttribute("title");
    cell.addEventListener("pointermove", (event) => tell(event, cell.dataset.says));
    cell.addEventListener("focus", () => {
      const box = cell.getBoundingClientRect();
      tell({ clientX: box.left, clientY: box.bottom - 12 }, cell.dataset.says);
    });
    cell.addEventListener("pointerleave", quiet);
    cell.addEventListener("blur", quiet);
  }
  addEventListener("scroll", quiet, { passive: true });
  addEventListener("keydown", (event) => { if (event.key === "Escape") quiet(); });

  // Tables: a press on a heading sorts, a choice filters.
  const units = { B: 1, KB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12, KiB: 1024, MiB: 1024 ** 2, GiB: 1024 ** 3 };
  function rank(text) {
    const found = text.replace(/,/g, "").match(/^([<>]?\s*[-+−]?[\d.]+(?:e[-+]?\d+)?)\s*([KMGT]i?B|B)?/);
    if (text === "infinite") return Infinity;
    if (!found) return text;
    return parseFloat(found[1].replace(/[<>\s]/g, "").replace("−", "-")) * (units[found[2]] || 1);
  }
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b
    : typeof a === typeof b ? String(a).localeCompare(String(b)) : typeof a === "number" ? -1 : 1);
  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows];
        const ranks = new Map(rows.map((row) => [row, rank(row.cells[column].textContent.trim())]));
        rows.sort((a, b) => (down ? -1 : 1) * compare(ranks.get(a), ranks.get(b)));
        table.tBodies[0].append(...rows);
      });
    });
  }
  const filtered = ["asked", "method", "pattern", "merge", "seed", "task", "state", "step", "told apart"];
  function choices(table) {
    const bar = document.createElement("div");
    bar.className = "choose";
    const rows = [...table.tBodies[0].rows];
    const chosen = new Map();
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const name = head.textContent.trim();
      const values = [...new Set(rows.map((row) => row.cells[column].textContent.trim()))];
      if (!filtered.includes(name) || values.length < 2 || values.length > 24) return;
      const select = document.createElement("select");
      select.add(new Option("all", ""));
      values.forEach((value) => select.add(new Option(value, value)));
      select.addEventListener("change", () => {
        chosen.set(column, select.value);
        for (const row of rows) {
          row.classList.toggle("out", [...chosen].some(([at, value]) => value && row.cells[at].textContent.trim() !== value));
        }
      });
      const label = document.createElement("label");
      label.append(`${name} `, select);
      bar.append(label);
    });
    if (bar.childNodes.length) table.closest(".wide").before(bar);
  }
  for (const table of document.querySelectorAll(".wide > table:not(.matrix)")) {
    if (!table.tHead || !table.tBodies.length || table.tBodies[0].rows.length < 2) continue;
    choices(table);
    sortable(table);
  }

  // On paper nothing is folded.
  const opened = new Set();
  function unfold() {
    for (const part of document.querySelectorAll("details:not([open])")) { part.open = true; opened.add(part); }
  }
  function fold() {
    for (const part of opened) part.open = false;
    opened.clear();
  }
  addEventListener("beforeprint", unfold);
  addEventListener("afterprint", fold);
  matchMedia("print").addEventListener("change", (event) => (event.matches ? unfold() : fold()));
})();
