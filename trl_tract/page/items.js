// The table of all items: sorts, filters and turns pages. Puts text in as text, never as markup.
(() => {
  "use strict";
  const [GROUP, SCORE, ERROR, PAGE] = [1, 3, 4, 50];
  const byId = (id) => document.getElementById(id);
  const table = byId("items-table");
  const rows = JSON.parse(byId("items-data").textContent);
  const heads = [...table.tHead.rows[0].cells];
  const shown = heads.map((_, column) => column !== GROUP || rows.some((row) => row[GROUP] !== null));
  heads.forEach((head, column) => { head.hidden = !shown[column]; });
  let found = rows, sorted = null, descending = false, page = 0;

  const compare = (a, b) => {
    const [x, y] = [a[sorted], b[sorted]];
    if (x === null || y === null) return (x === null) - (y === null);  // nothing comes last, either way
    const order = typeof x === "number" ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true });
    return descending ? -order : order;
  };

  const draw = () => {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const part = found.slice(page * PAGE, (page + 1) * PAGE);
    table.tBodies[0].replaceChildren(...part.map((row) => {
      const line = document.createElement("tr");
      row.forEach((cell, column) => {
        if (!shown[column]) return;
        const place = document.createElement("td");
        const number = typeof cell === "number";
        place.textContent = cell === null ? "" : number ? cell.toFixed(column === 2 ? 2 : 3) : cell;
        place.className = number || heads[column].className === "number" ? "number" : "text";
        if (!number) place.dir = "auto";
        line.append(place);
      });
      return line;
    }));
    const first = found.length ? page * PAGE + 1 : 0;
    byId("items-count").textContent = `${first} to ${first + part.length - (found.length ? 1 : 0)} of ${found.length}`
      + (found.length < rows.length ? ` found among ${rows.length} items` : " items");
    byId("items-earlier").disabled = page === 0;
    byId("items-later").disabled = page === pages - 1;
  };

  const select = () => {
    const words = byId("items-words").value.toLowerCase();
    const kind = byId("items-kind").value;
    const least = Number(byId("items-error").value) || 0;
    found = rows.filter((row) => (kind === "all" || (kind === "failed") === (row[SCORE] === null))
      && (least === 0 || (row[ERROR] !== null && Math.abs(row[ERROR]) >= least))
      && (words === "" || row.some((cell) => typeof cell === "string" && cell.toLowerCase().includes(words))));
    if (sorted !== null) found = [...found].sort(compare);
    page = 0;
    draw();
  };

  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    descending = sorted === column && !descending;
    sorted = column;
    heads.forEach((each) => each.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    select();
  }));
  for (const id of ["items-words", "items-kind", "items-error"]) byId(id).addEventListener("input", select);
  byId("items-earlier").addEventListener("click", () => { page -= 1; draw(); });
  byId("items-later").addEventListener("click", () => { page += 1; draw(); });
  byId("items-all").hidden = false;
  draw();
})();
