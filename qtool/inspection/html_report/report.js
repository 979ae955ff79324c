"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  document.documentElement.classList.add("js");

  // Tooltips: text only, so that no name from a checkpoint becomes markup.
  const tip = byId("tip");
  let tipOwner = null;
  const hideTip = () => { tip.hidden = true; tipOwner = null; };
  const showTip = (target) => {
    tipOwner = target;
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    placeTip();
  };
  const placeTip = () => {
    if (!tipOwner) return;
    const at = tipOwner.getBoundingClientRect();
    if (at.bottom < 0 || at.top > innerHeight) return hideTip();
    const width = tip.offsetWidth;
    const height = tip.offsetHeight;
    const left = Math.min(Math.max(at.left + at.width / 2 - width / 2, 8), innerWidth - width - 8);
    const above = at.top - height - 8;
    tip.style.left = `${Math.max(left, 8)}px`;
    tip.style.top = `${above < 8 ? Math.min(at.bottom + 8, innerHeight - height - 8) : above}px`;
  };
  const tipped = (event) => event.target.closest?.("[data-tip]");
  for (const element of document.querySelectorAll("[title]")) {
    element.dataset.tip = element.title; // the browser's own tooltip is for pages without scripts
    element.removeAttribute("title");
    if (element.tagName === "TD") element.setAttribute("aria-label", `${element.textContent}: ${element.dataset.tip}`);
  }
  for (const type of ["mouseover", "focusin"]) {
    document.addEventListener(type, (event) => (tipped(event) ? showTip(tipped(event)) : hideTip()));
  }
  document.addEventListener("focusout", hideTip);
  document.addEventListener("scroll", placeTip, { capture: true, passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

  // Heat maps: one stop of the tab key each, arrow keys inside.
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  for (const table of document.querySelectorAll("table.heat")) {
    const rows = [...table.tBodies[0].rows];
    const cells = rows.map((row) => [...row.cells].slice(1));
    const focusable = cells.flat().filter((cell) => cell.dataset.tip);
    for (const cell of focusable) cell.tabIndex = -1;
    if (focusable.length) focusable[0].tabIndex = 0;
    table.addEventListener("focusin", (event) => {
      for (const cell of focusable) cell.tabIndex = cell === event.target ? 0 : -1;
    });
    table.addEventListener("keydown", (event) => {
      const cell = event.target.closest("td");
      if (!cell) return;
      if (event.key === "Enter") { event.preventDefault(); list(cell.dataset.filter); }
      if (!(event.key in moves)) return;
      event.preventDefault();
      const [down, right] = moves[event.key];
      let row = rows.indexOf(cell.parentElement) + down;
      let column = cells[rows.indexOf(cell.parentElement)].indexOf(cell) + right;
      while (cells[row]?.[column] && !cells[row][column].dataset.tip) { row += down; column += right; }
      cells[row]?.[column]?.focus();
    });
    table.addEventListener("click", (event) => {
      const cell = event.target.closest("td[data-filter]");
      if (cell) list(cell.dataset.filter);
    });
  }

  // The list of all modules: sorted and filtered here, and shown a page at a time.
  const all = byId("all");
  if (!all) return;
  const PAGE = 200;
  const { columns, rows } = JSON.parse(byId("data").textContent);
  const words = rows.map((row) => `${row[0]} ${row[1]}`.toLowerCase());
  const formats = {
    text: String,
    count: (value) => value.toLocaleString("en-US"),
    fixed: (value) => value.toFixed(2),
    number: (value) => String(Number(value.toPrecision(3))),
    percent: (value) => `${(value * 100).toFixed(2)} %`,
    bytes: (value) => {
      const power = Math.min(Math.floor(Math.log10(Math.max(value, 1)) / 3), 4);
      return `${(value / 1000 ** power).toFixed(power ? 2 : 0)} ${["B", "kB", "MB", "GB", "TB"][power]}`;
    },
  };
  const format = (value, kind) => (value === null ? "–" : typeof value === "string" ? value : formats[kind](value));
  const rank = { equal: Infinity, inf: Infinity, "-inf": -Infinity, nan: -Infinity };
  const head = byId("modules").tHead;
  const body = byId("modules").tBodies[0];
  let order = { column: -1, sign: 1 };
  let found = [];
  let shown = 0;

  const compare = (a, b) => {
    const [x, y] = [rows[a][order.column], rows[b][order.column]];
    if (x === null || y === null) return (x === null) - (y === null);
    if (columns[order.column][1] === "text") return order.sign * x.localeCompare(y, "en", { numeric: true });
    const [p, q] = [rank[x] ?? x, rank[y] ?? y];
    return order.sign * (p < q ? -1 : p > q ? 1 : 0);
  };
  const show = () => {
    const lines = document.createDocumentFragment();
    for (const index of found.slice(shown, shown + PAGE)) {
      const line = document.createElement("tr");
      rows[index].forEach((value, column) => {
        const cell = document.createElement("td");
        cell.textContent = format(value, columns[column][1]);
        if (columns[column][1] !== "text") cell.className = "n";
        line.append(cell);
      });
      lines.append(line);
    }
    body.append(lines);
    shown = Math.min(shown + PAGE, found.length);
    byId("more").hidden = shown >= found.length;
    byId("matches").textContent = `${found.length.toLocaleString("en-US")} of ${rows.length.toLocaleString("en-US")}`;
  };
  const update = () => {
    const wanted = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    found = [...rows.keys()].filter((index) => wanted.every((word) => words[index].includes(word)));
    if (order.column >= 0) found.sort(compare);
    body.replaceChildren();
    shown = 0;
    show();
  };
  function list(text) {
    all.open = true;
    byId("filter").value = text;
    update();
    all.scrollIntoView({ block: "start" });
    byId("filter").focus({ preventScroll: true });
  }

  const titles = document.createElement("tr");
  columns.forEach(([title, kind], column) => {
    const cell = document.createElement("th");
    const button = document.createElement("button");
    cell.scope = "col";
    if (kind !== "text") cell.className = "n";
    button.type = "button";
    button.textContent = title;
    button.addEventListener("click", () => {
      order = { column, sign: order.column === column ? -order.sign : 1 };
      for (const other of titles.children) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending");
      update();
    });
    cell.append(button);
    titles.append(cell);
  });
  head.append(titles);
  byId("filter").addEventListener("input", update);
  byId("filter").form.addEventListener("submit", (event) => event.preventDefault());
  byId("more").addEventListener("click", show);
  all.addEventListener("toggle", () => { if (all.open && !shown) update(); });
})();
