// Sorting by a click on a heading, one GPU at a time, a filter over all tables, and the choice of light or dark.
const root = document.documentElement;

for (const heading of document.querySelectorAll("th button")) {
  heading.addEventListener("click", () => {
    const th = heading.parentElement, body = th.closest("table").tBodies[0];
    const column = th.cellIndex, down = th.getAttribute("aria-sort") === "descending";
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const sign = down ? 1 : -1, absent = (value) => value === "";
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (absent(x) || absent(y)) return absent(x) - absent(y);
      return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y, "en", { numeric: true }) : x - y);
    });
    for (const other of th.parentElement.cells) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", down ? "ascending" : "descending");
    body.append(...rows);
  });
}

const sections = [...document.querySelectorAll("section[data-gpu]")];
const choices = [...document.querySelectorAll("button[data-gpu]")];
function show(gpu) {
  for (const section of sections) section.classList.toggle("hidden", section.dataset.gpu !== gpu);
  for (const choice of choices) choice.setAttribute("aria-pressed", choice.dataset.gpu === gpu);
}
for (const choice of choices) choice.addEventListener("click", () => show(choice.dataset.gpu));
if (choices.length) show(choices[0].dataset.gpu);

document.querySelector("#filter").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of document.querySelectorAll("tr[data-title], figure[data-title]")) {
    row.classList.toggle("hidden", !words.every((word) => row.dataset.title.toLowerCase().includes(word)));
  }
  for (const family of document.querySelectorAll(".family")) {
    family.classList.toggle("hidden", !family.querySelector("[data-title]:not(.hidden)"));
  }
});

document.querySelector("#theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
