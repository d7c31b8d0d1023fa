"use strict";

// Each picture is in the file once; here it is copied to where it is shown.
for (const shown of document.querySelectorAll("img[data-copy]")) {
  const source = document.getElementById(shown.dataset.copy);
  shown.src = source.src;
  shown.alt = source.alt;
}

// A range input sets how far its picture is uncovered, or how strong its map is.
for (const input of document.querySelectorAll("input[data-at]")) {
  const stack = document.getElementById(input.dataset.at);
  const show = () => stack.style.setProperty("--at", `${input.value}%`);
  input.addEventListener("input", show);
  show();
  if (!stack.closest(".compare")) continue;
  const drag = (event) => {
    const box = stack.getBoundingClientRect();
    input.value = Math.round((100 * (event.clientX - box.left)) / box.width);
    show();
  };
  stack.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    stack.setPointerCapture(event.pointerId);
    drag(event);
  });
  stack.addEventListener("pointermove", (event) => {
    if (stack.hasPointerCapture(event.pointerId)) drag(event);
  });
}

// Which picture is on which side.
for (const select of document.querySelectorAll("select[data-side]")) {
  const shown = document.getElementById(select.dataset.side);
  const show = () => {
    const source = document.getElementById(select.value);
    shown.src = source.src;
    shown.alt = source.alt;
  };
  select.addEventListener("change", show);
}

// Sort a table by a column; the button in its heading is for the keyboard, too.
for (const table of document.querySelectorAll("table.sort")) {
  table.querySelectorAll("thead th").forEach((heading, at) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    let up = false;
    button.addEventListener("click", () => {
      up = !up;
      const value = (row) => {
        const text = row.cells[at].textContent.replace(/,/g, "");
        const number = parseFloat(text);
        return isNaN(number) ? text : number;
      };
      const rows = [...table.tBodies[0].rows].sort((first, second) => {
        const [a, b] = [value(first), value(second)];
        if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
        return (a < b ? -1 : a > b ? 1 : 0) * (up ? 1 : -1);
      });
      table.tBodies[0].append(...rows);
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    });
  });
}
