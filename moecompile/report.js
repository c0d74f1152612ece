// Draws the graphs of the report page when they are opened, filters, and shows where a value is made and used.
"use strict";

const GRAPHS = JSON.parse(document.getElementById("graphs").textContent);
const search = document.querySelector(".bar input");
const CONTEXT = 3; // unchanged lines kept around a change
const TOKEN = /(#.*$)|("(?:[^"\\]|\\.)*")|(%\d+)|(moecompile\.\w+)|(\b(?:b?f\d+\w*|[iuc]\d+|bool)\[[^\]]*\])/g;
const CLASSES = ["c", "s", "v", "o", "t"];

const escape = (text) => text.replace(/[&<>]/g, (mark) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[mark]);

function coloured(line) {
  let html = "";
  let last = 0;
  for (const match of line.matchAll(TOKEN)) {
    const kind = CLASSES[match.slice(1).findIndex((group) => group !== undefined)];
    html += `${escape(line.slice(last, match.index))}<i class="${kind}">${escape(match[0])}</i>`;
    last = match.index + match[0].length;
  }
  return html + escape(line.slice(last));
}

function row(kind, ...cells) {
  const line = document.createElement("tr");
  line.className = kind;
  line.innerHTML = cells.map((cell) => (cell === null ? "<td></td>" : `<td>${coloured(cell)}</td>`)).join("");
  line.dataset.text = cells.join(" ").toLowerCase();
  return line;
}

function fold(lines) {
  const line = document.createElement("tr");
  line.className = "fold";
  line.innerHTML = `<td colspan="2">${lines.length} unchanged lines</td>`;
  line.onclick = () => line.replaceWith(...lines);
  return line;
}

// Lines that go and lines that come in their place stand side by side.
function paired(graph) {
  const runs = [];
  for (const [kind, before, after, count] of graph.rows) {
    const left = before === null ? [] : graph.before.slice(before, before + count);
    const right = after === null ? [] : graph.after.slice(after, after + count);
    const last = runs.at(-1);
    if (kind === "added" && last?.kind === "removed") Object.assign(last, { kind: "removed added", right });
    else runs.push({ kind, left, right });
  }
  return runs;
}

function drawChanges(graph) {
  const drawn = [];
  const runs = paired(graph);
  runs.forEach(({ kind, left, right }, place) => {
    const count = Math.max(left.length, right.length);
    const lines = Array.from({ length: count }, (_, step) => row(kind, left[step] ?? null, right[step] ?? null));
    const head = place === 0 ? 0 : CONTEXT;
    const tail = place === runs.length - 1 ? 0 : CONTEXT;
    if (kind !== "same" || count <= head + tail + 2) drawn.push(...lines);
    else drawn.push(...lines.slice(0, head), fold(lines.slice(head, count - tail)), ...lines.slice(count - tail));
  });
  const heading = document.createElement("tr");
  heading.innerHTML = "<th>before</th><th>after</th>";
  return [heading, ...drawn];
}

function show(pane, graph, view) {
  const body = document.createElement("table");
  body.append(...(view === "changes" ? drawChanges(graph) : graph[view].map((line) => row("plain", line))));
  pane.replaceChildren(body);
  pane.scrollTop = 0;
  filter();
}

for (const card of document.querySelectorAll("details.graph")) {
  const graph = GRAPHS[card.dataset.graph];
  const pane = card.querySelector(".pane");
  const tabs = [...card.querySelectorAll(".tabs button")];
  const choose = (tab) => {
    tabs.forEach((each) => each.setAttribute("aria-selected", each === tab));
    show(pane, graph, tab.dataset.view);
  };
  tabs.forEach((tab) => (tab.onclick = () => choose(tab)));
  const draw = () => card.open && tabs.length && !pane.firstChild && choose(tabs[0]);
  card.addEventListener("toggle", draw);
  draw();
}

// A value lights up wherever it is made or used, on its own side of a comparison.
function places(mark) {
  const column = mark.closest("td").cellIndex + 1;
  const marks = mark.closest("table").querySelectorAll(`td:nth-child(${column}) .v`);
  return [...marks].filter((each) => each.textContent === mark.textContent);
}
document.addEventListener("mouseover", (event) => {
  document.querySelectorAll(".hot").forEach((each) => each.classList.remove("hot"));
  if (event.target.matches(".pane .v")) places(event.target).forEach((each) => each.classList.add("hot"));
});
document.addEventListener("click", (event) => {
  if (event.target.matches(".pane .v")) places(event.target)[0].scrollIntoView({ block: "center", behavior: "smooth" });
});

function filter() {
  const wanted = search.value.trim().toLowerCase();
  let hits = 0;
  for (const entry of document.querySelectorAll("[data-text]")) {
    const hit = entry.dataset.text.includes(wanted);
    entry.classList.toggle("gone", !hit);
    hits += hit;
  }
  document.querySelectorAll(".fold").forEach((each) => each.classList.toggle("gone", wanted !== ""));
  document.querySelector(".bar output").textContent = wanted ? `${hits} ${hits === 1 ? "line" : "lines"}` : "";
}
search.addEventListener("input", filter);
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== search) {
    event.preventDefault();
    search.focus();
  }
});

document.querySelector(".bar button").onclick = () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
};
