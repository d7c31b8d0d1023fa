for (const table of document.querySelectorAll("table.sort")) {
  table.querySelectorAll("th").forEach((th, at) => {
    let up = false;
    th.addEventListener("click", () => {
      up = !up;
      const value = (r) => { const t = r.cells[at].textContent.replace(/,/g, "");
        const n = parseFloat(t); return isNaN(n) ? t : n; };
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const x = value(a), y = value(b);
        if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
        return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1); });
      rows.forEach((r) => table.tBodies[0].append(r));
    });
  });
}
