"use strict";
// Only adds: sorting, filtering, what is said of a leaf at the pointer, and addresses by name.
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const collator = new Intl.Collator("en", { numeric: true });

  // ---- sorting

  const valueOf = (cell) => (cell.dataset.v ?? cell.textContent).trim();

  function sort(table, column, descending) {
    const sign = descending ? -1 : 1;
    const found = [...table.tBodies[0].rows].map((row) => [valueOf(row.cells[column]), row]);
    const numeric = found.every(([value]) => value === "" || Number.isFinite(Number(value)));
    found.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (numeric ? a - b : collator.compare(a, b));
    });
    table.tBodies[0].append(...found.map(([, row]) => row));
    all("thead tr:last-child th", table).forEach((head, i) => {
      const order = descending ? "descending" : "ascending";
      head.setAttribute("aria-sort", i === column ? order : "none");
    });
  }

  for (const table of all("table")) {
    if (table.tBodies[0].rows.length < 2) continue;
    all("thead tr:last-child th", table).forEach((head, column) => {
      if (!head.textContent) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      // Of numbers the large ones are looked for first.
      const first = head.matches(".n, .b") ? "descending" : "ascending";
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        const descending = now === "none" ? first === "descending" : now === "ascending";
        sort(table, column, descending);
      });
    });
  }

  // ---- filtering

  const filters = [];
  for (const form of all("form.filter")) {
    const rows = [...document.getElementById(`${form.dataset.of}-table`).tBodies[0].rows];
    const texts = new Map(rows.map((row) => [
      row,
      [...all(".s", row).map((cell) => cell.textContent), row.dataset.leaves ?? ""].join("\n").toLowerCase(),
    ]));
    const output = form.querySelector("output");
    const refilter = () => {
      const asked = Object.fromEntries(new FormData(form));
      const text = (asked.text ?? "").trim().toLowerCase();
      let shown = 0;
      for (const row of rows) {
        const fits = texts.get(row).includes(text)
          && Object.entries(asked).every(([name, value]) => name === "text" || !value || row.dataset[name] === value);
        // What the address names is shown, whatever else is.
        row.hidden = !fits && row !== addressed();
        shown += fits;
      }
      output.value = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
    };
    for (const kind of ["input", "change"]) form.addEventListener(kind, refilter);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    filters.push(refilter);
  }

  // ---- addresses: #kernel=fusion.12, or the name alone

  function addressed() {
    let id = location.hash.slice(1);
    try { id = decodeURIComponent(id); } catch { /* a percent sign that is one */ }
    return id ? document.getElementById(id) ?? document.getElementById(`kernel=${id}`) : null;
  }

  function reveal() {
    all(".found").forEach((element) => element.classList.remove("found"));
    filters.forEach((refilter) => refilter());
    const element = addressed();
    if (!element) return;
    for (let at = element.closest("details"); at; at = at.parentElement.closest("details")) at.open = true;
    if (!element.matches("tr, td a, pre a")) return;
    element.classList.add("found");
    element.scrollIntoView({ block: "center", inline: "start" });
  }
  addEventListener("hashchange", reveal);
  // The same address once more: after scrolling on, or filtering.
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (link && link.getAttribute("href") === location.hash) reveal();
  });
  reveal();

  // ---- what is said of a leaf

  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  let told = null;
  const hide = () => {
    told = null;
    tip.hidden = true;
    all(".kin").forEach((other) => other.classList.remove("kin"));
  };
  const show = (leaf) => {
    hide();
    told = leaf;
    tip.textContent = leaf.getAttribute("aria-label");
    tip.hidden = false;
    const to = CSS.escape(leaf.getAttribute("href"));
    all(`svg a[href="${to}"]`, leaf.closest(".map")).forEach((other) => other.classList.add("kin"));
    const at = leaf.getBoundingClientRect();
    const [width, height] = [document.documentElement.clientWidth, innerHeight];
    const isBelow = at.bottom + tip.offsetHeight + 14 < height;
    const top = isBelow ? at.bottom + 6 : Math.max(at.top - tip.offsetHeight - 6, 8);
    tip.style.left = `${Math.max(8, Math.min(at.left, width - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.min(top, height - tip.offsetHeight - 8)}px`;
  };
  for (const leaf of all(".map svg a")) {
    const title = leaf.querySelector("title");
    leaf.setAttribute("aria-label", title.textContent);
    title.remove();
    leaf.addEventListener("pointerenter", () => show(leaf));
    leaf.addEventListener("pointerleave", hide);
    leaf.addEventListener("focus", () => show(leaf));
    leaf.addEventListener("blur", hide);
  }
  addEventListener("keydown", (event) => event.key === "Escape" && hide());
  // Reaching a leaf by the keyboard scrolls to it.
  const follow = () => told && (told === document.activeElement ? show(told) : hide());
  addEventListener("scroll", follow, { passive: true });
})();
