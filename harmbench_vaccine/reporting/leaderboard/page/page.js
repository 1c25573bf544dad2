"use strict";
// Texts of the data enter the document only as text nodes and as harmless attributes.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const text = (index) => data.texts[index];
const named = (names, values) => Object.fromEntries(names.map((name, index) => [name, values[index]]));
const groups = (items, key) => [...Map.groupBy(items, key).values()];
const make = (create) => (name, attributes, ...children) => {
  const element = create(name);
  Object.entries(attributes).forEach(([key, each]) => each === false || element.setAttribute(key, each));
  element.append(...children.flat().filter((child) => child !== false));
  return element;
};
const html = make((name) => document.createElement(name));
const svg = make((name) => document.createElementNS("http://www.w3.org/2000/svg", name));
const line = (name, x1, y1, x2, y2) => svg("line", { class: name, x1, y1, x2, y2 });

// --- Data ---
const PLACE = ["attack", "task", "model", "scorer", "protocol"];
const cells = data.cells.map((values) => {
  const cell = named(data.columns, values);
  const [place, runs] = [data.settings[cell.setting], cell.runs.map((run) => named(data.run_columns, run))];
  const [defense, parameters, reasons] = [cell.defense, cell.parameters, cell.reasons].map(text);
  const facts = data.defenses[defense];
  const searched = `${defense} ${place.attack} ${place.task} ${parameters} ${facts.summary}`.toLowerCase();
  const facets = { ...place, protocol: `${place.protocol} ${place.protocol_hash}`, attack_evidence: text(place.attack_evidence), ...facts };
  return { ...cell, id: runs[0].run, place, runs, defense, parameters, reasons, facts, facets, searched };
});
const varied = PLACE.filter((key) => new Set(cells.map((cell) => cell.facets[key])).size > 1);
const label = (cell, without) => varied.filter((key) => key !== without).map((key) => cell.facets[key]).join(", ");
all("#ranking thead th").forEach((head) => cells.some((cell) => cell[head.dataset.key] !== null) || head.remove());
const heads = all("#ranking thead th");

// --- State: filters, order and open rows, which the fragment of the address has ---
const state = { q: "", sort: "rank", open: new Set(), filters: {} };
const toggle = (set, item) => set.delete(item) || set.add(item);

function load() {
  const params = new URLSearchParams(location.hash.slice(1));
  state.q = params.get("q") ?? "";
  state.sort = params.get("sort") ?? "rank";
  if (!heads.some((head) => head.dataset.key === state.sort.replace("-", ""))) state.sort = "rank";
  state.open = new Set(params.getAll("open"));
  for (const { key, values } of data.facets) {
    const chosen = location.hash.length > 1 ? params.getAll(key) : data.start[key] ?? [];
    state.filters[key] = new Set(chosen.filter((each) => values.includes(each)));
  }
  byId("search").value = state.q;
}

function save() {
  const params = new URLSearchParams();
  if (state.q) params.set("q", state.q);
  if (state.sort !== "rank") params.set("sort", state.sort);
  for (const [key, values] of Object.entries(state.filters)) values.forEach((each) => params.append(key, each));
  state.open.forEach((id) => params.append("open", id));
  history.replaceState(null, "", `#${params.toString() || "all"}`);
  render();
}

function matches(cell, without) {
  const chosen = Object.entries(state.filters).filter(([key, values]) => key !== without && values.size);
  return cell.searched.includes(state.q.toLowerCase())
    && chosen.every(([key, values]) => [cell.facets[key]].flat().some((each) => values.has(each)));
}

function compare(a, b) {
  const [key, sign] = state.sort.startsWith("-") ? [state.sort.slice(1), -1] : [state.sort, 1];
  const [x, y] = [a[key], b[key]];
  const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
  return (a.mark !== "") - (b.mark !== "") || (x === null) - (y === null) || sign * order; // marked cells are last
}

const shownCells = () => cells.filter((cell) => matches(cell)).sort((a, b) => a.setting - b.setting || compare(a, b));

// --- Formats of the cells of the table and of the row that opens ---
const optional = (convert) => (value) => (value === null ? "–" : convert(value));
const fixed = optional((value) => value.toFixed(1));
const signed = optional((value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(1)}`);
const precise = optional((value) => String(Number(value.toPrecision(3))));
const duration = optional((s) => (s < 90 ? `${s.toFixed(0)} s` : s < 5400 ? `${(s / 60).toFixed(0)} min` : `${fixed(s / 3600)} h`));
const range = (cell, key, format) => `${format(cell[`${key}_low`])} to ${format(cell[`${key}_high`])}`;
const ranks = (first, last) => (first === last ? `${first}` : `${first}–${last}`);
const doubt = (cell) => `${cell.mark} ${cell[`${cell.mark.replace("-", "_")}_cells`]}/${cell.seeds}`;
const breakable = (name) => name.split(/(?<=[_,:+])/).flatMap((part) => [html("wbr", {}), part]);
const small = (...content) => html("div", { class: "small" }, ...content);

function bar(cell, key) {
  const [low, high, mean] = ["_low", "_high", ""].map((end) => cell[key + end]);
  return svg("svg", { class: "range", viewBox: "0 0 100 9", preserveAspectRatio: "none", "aria-hidden": "true" },
    line("grid", 0, 4.5, 100, 4.5), line("mean", mean, 0, mean, 9),
    svg("rect", { x: low, y: 1.5, width: Math.max(high - low, 1), height: 6 }));
}

const FORMATS = {
  rank: (cell) => (cell.rank === null ? [html("span", { class: "mark" }, doubt(cell))]
    : [ranks(cell.tie_first, cell.tie_last), cell.pareto === 1 && small("Pareto")]),
  name: (cell) => [
    html("button", { "data-action": "open", id: `open-${cell.id}`, "aria-expanded": `${state.open.has(cell.id)}` }, breakable(cell.defense)),
    html("div", { class: `small dot ${cell.facts.color}` }, cell.facts.stage.join(", "),
      html("span", { class: "badge tablet", title: [cell.facts.evidence, ...cell.facts.departures.map(text)].join("\n") }, cell.facts.badge))],
  score: (cell, key) => [html("b", {}, fixed(cell[key])), html("span", { class: "interval" }, range(cell, key, fixed)),
    key === "finetune_accuracy" && !cell.trained && small("untrained"), bar(cell, key)],
  difference: (cell, key) => (cell[key] === null ? []
    : [signed(cell[key]) + (Math.abs(cell[key]) < cell[key.replace("difference", "floor")] ? "~" : cell[`${key}_p`] < 0.05 ? "*" : ""), small(range(cell, key, signed))]),
  published: (cell, key) => (cell[key] === null ? [] : [fixed(cell[key]), small(signed(cell.harmful_score - cell[key]))]),
  percent: (cell, key) => [fixed(cell[key])],
  number: (cell, key) => [precise(cell[key])],
  duration: (cell, key) => [duration(cell[key])],
  memory: (cell, key) => [cell[key] === null ? "–" : `${fixed(cell[key] / 2 ** 30)} GiB`],
  text: (cell, key) => [(cell.facets[key] ?? cell[key]) || "–"],
  interval: (cell, key) => [`${fixed(cell[key])}, ${range(cell, key, fixed)}`],
  comparison: (cell, key) => [`${signed(cell[key])}, ${range(cell, key, signed)}, p = ${precise(cell[`${key}_p`])}`],
  position: (cell) => [cell.rank === null ? `none: ${doubt(cell)}` : `${cell.rank}, ${ranks(cell.rank_low, cell.rank_high)}`],
  command: ({ place, facts, runs }) => [`hbv run ${place.options} ${facts.option}`, ...runs.map(({ seed }) => ` --seed ${seed}`)],
  runs: (cell) => cell.runs.map((run) => html("tr", {}, [run.seed, html("code", {}, run.run), fixed(run.harmful_score),
    fixed(run.finetune_accuracy), duration(run.seconds), html("code", {}, run.key ?? "–")].map((each) => html("td", {}, each)))),
  versions: (cell) => [[...new Set(cell.runs.flatMap((run) => [run.versions, run.machine].map(text)))].filter(Boolean).join("; ")],
  published_figures: (cell) => cell.published.map(([title, value, verdict, ...notes]) => html("li", {},
    html("b", {}, `${title} ${value}`), ` (${verdict})`, notes.map((index) => small(text(index))))),
  listed: (cell, key) => (cell.facets[key] ?? cell[key]).map((index) => html("li", {}, text(index))),
  answers: (cell) => (data.answers[cell.id] ?? []).map(([prompt, ...pair]) => html("li", {}, html("b", {}, text(prompt)),
    ["before", "after"].map((when, index) => html("p", {}, html("i", {}, `${when}: `), text(pair[2 * index]) ?? "–",
      pair[2 * index + 1] === true && html("b", { class: "flagged" }, " flagged"))))),
};
const format = (name, cell, key) => FORMATS[name](cell, key).filter((part) => part !== false);

// --- Table ---
function renderTable(shown) {
  all("#ranking > tbody").forEach((body) => body.remove());
  const order = state.sort.startsWith("-") ? "descending" : "ascending";
  heads.forEach((head) => head.setAttribute("aria-sort", head.dataset.key === state.sort.replace("-", "") ? order : "none"));
  const settings = groups(shown, (cell) => cell.setting);
  byId("ranking").append(...settings.map((group) => html("tbody", {},
    settings.length > 1 && html("tr", {}, html("th", { scope: "rowgroup", colspan: heads.length }, label(group[0]), small(`evidence for the attack: ${group[0].facets.attack_evidence}`))),
    group.flatMap((cell, index) => [row(cell, group[index - 1]), state.open.has(cell.id) && details(cell)]))));
}

function row(cell, previous) {
  const isEdge = state.sort === "rank" && previous && cell.tie_first !== previous.tie_first;
  return html("tr", { class: `cell ${cell.mark} ${isEdge ? "edge" : ""}`, id: `cell-${cell.id}`, "data-defense": cell.defense },
    heads.map(({ dataset: { key, kind }, className }) => html(kind === "name" ? "th" : "td",
      { class: className, scope: kind === "name" && "row" }, format(kind, cell, key))));
}

function details(cell) {
  const content = byId("details").content.cloneNode(true);
  all("[data-show]", content).forEach((slot) => {
    const [name, key] = slot.dataset.show.split(" ");
    const parts = format(name, cell, key);
    slot.append(...parts);
    if (!parts.length) slot.closest("[data-part]").remove();
  });
  return html("tr", { class: "details" }, html("td", { colspan: heads.length }, content));
}

// --- Figures ---
const [MOST_FIGURES, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [4, 320, 34, 120, 10, 40];
const WIDTH = Math.min(520, Math.max(340, document.body.clientWidth)); // in pixels, so that text is as large on a phone
const PERCENT = [0, 20, 40, 60, 80, 100];
const shortened = (name) => (name.length > 18 ? `${name.slice(0, 17)}…` : name);
const word = (x, y, anchor, content) => svg("text", { x, y, "text-anchor": anchor }, content);
const point = (cell, [cx, cy]) => svg("circle", { class: `point ${cell.mark}`, cx, cy, r: 4.2 }, svg("title", {},
  `${cell.defense}, ${cell.place.attack}: HS ${fixed(cell.harmful_score)}, FA ${fixed(cell.finetune_accuracy)} ${cell.mark}`));

function plot(title, subtitle, xs, ys, xTitle, xTick, names, height = Math.max(HEIGHT, 11 * names + TOP + BOTTOM - 16)) {
  const scale = (ticks, from, to) => (value) => from + ((value - ticks[0]) / (ticks.at(-1) - ticks[0])) * (to - from);
  const [right, bottom] = [WIDTH - RIGHT, height - BOTTOM];
  const [x, y] = [scale(xs, LEFT, right), scale(ys, bottom, TOP)];
  const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": `${title}; the tables have the numbers` },
    ys.flatMap((tick) => [line("grid", LEFT, y(tick), right, y(tick)), word(LEFT - 6, y(tick) + 4, "end", tick)]),
    line("axis", LEFT, bottom, right, bottom), xs.map((tick) => word(x(tick), bottom + 16, "middle", xTick(tick))),
    word((LEFT + right) / 2, height - 4, "middle", xTitle));
  return { root, x, y, full: height, figure: html("figure", {}, html("figcaption", {}, title, html("span", {}, subtitle)), root) };
}

function drawCurves(family) {
  const ratios = [...new Set(family.map((cell) => cell.place.ratio))].sort((a, b) => a - b);
  const subtitle = label(family[0], "attack") || "lower is better; bars are 95% intervals";
  const curves = groups(family, (cell) => cell.defense).map((curve) => curve.sort((a, b) => a.place.ratio - b.place.ratio));
  const { root, x, y, full, figure } = plot("HS against the harmful ratio", subtitle, ratios, PERCENT,
    "harmful ratio p of the user's data", (p) => `${precise(100 * p)}%`, curves.length);
  const place = (cell, end = "") => [x(cell.place.ratio), y(cell[`harmful_score${end}`])];
  curves.sort((a, b) => b.at(-1).harmful_score - a.at(-1).harmful_score);
  const gap = Math.min(12.5, (full - TOP - BOTTOM + 16) / curves.length); // between labels, which must not overlap
  const heights = curves.map((curve) => place(curve.at(-1))[1]);
  heights.forEach((height, index) => { heights[index] = Math.max(height, (heights[index - 1] ?? -gap) + gap); });
  heights.reverse().forEach((height, index) => { heights[index] = Math.min(height, full - BOTTOM + 8 - gap * index); });
  root.append(...curves.map((curve, index) => {
    const [last, right, height] = [curve.at(-1), WIDTH - RIGHT, heights.at(-1 - index)];
    return svg("g", { class: last.facts.color, "data-defense": last.defense },
      curve.map((cell) => line("error", ...place(cell, "_low"), ...place(cell, "_high"))),
      svg("polyline", { class: "curve", points: curve.map((cell) => place(cell)).join(" ") }),
      curve.map((cell) => point(cell, place(cell))),
      line("leader", place(last)[0] + 6, place(last)[1], right + 15, height),
      word(right + 18, height + 4, "start", shortened(last.defense)));
  }));
  return figure;
}

function drawScatter(group) {
  const least = Math.max(0, 20 * Math.floor((Math.min(...group.map((cell) => cell.finetune_accuracy_low)) - 2) / 20));
  const ys = [0, 1, 2, 3, 4].map((step) => least + (step * (100 - least)) / 4);
  const subtitle = `${label(group[0]) || group[0].place.attack}; best: top left, dotted: Pareto front`;
  const { root, x, y, full, figure } = plot("FA against HS", subtitle, PERCENT, ys, "HS", String, group.length);
  const place = (cell, hs = "", fa = "") => [x(cell[`harmful_score${hs}`]), y(cell[`finetune_accuracy${fa}`])];
  const front = group.filter((cell) => cell.pareto).sort((a, b) => a.harmful_score - b.harmful_score).map((cell) => place(cell));
  const steps = front.map(([px, py], index) => (index ? `H${px}V${py}` : `M${px} ${py}`)).join("");
  root.append(svg("path", { class: "front", d: steps }));
  const taken = group.map((cell) => [place(cell)[0] - 5, place(cell)[1] + 4, 10]); // left, base and width of points and labels
  const names = []; // over the marks of all defenses
  root.append(...group.map((cell) => {
    const [[px, py], name, drawn] = [place(cell), shortened(cell.defense), { class: cell.facts.color, "data-defense": cell.defense }];
    const width = 6.6 * name.length;
    const isFree = ([left, base]) => left > LEFT && base > TOP + 8 && base < full - BOTTOM
      && !taken.some((box) => left < box[0] + box[2] && box[0] < left + width && Math.abs(base - box[1]) < 12);
    const shifts = [[8, 4], [-8 - width, 4], ...[1, 2, 3, 4, 5, 6, 7, 8].flatMap((row) => [[2, 5 + 12 * row], [2, -12 * row]])];
    const spot = shifts.map(([dx, dy]) => [px + dx, py + dy]).find(isFree);
    if (spot) { taken.push([...spot, width]); names.push(svg("g", drawn, word(...spot, "start", name))); }
    const errors = [["_low", "", "_high", ""], ["", "_low", "", "_high"]].map(([hs, fa, hsEnd, faEnd]) => line("error", ...place(cell, hs, fa), ...place(cell, hsEnd, faEnd)));
    return svg("g", drawn, errors, spot ? [line("leader", px, py, spot[0], spot[1] - 4)] : [], point(cell, [px, py]));
  }), ...names);
  return figure;
}

function renderFigures(shown) {
  const withRatio = cells.filter((cell) => cell.place.ratio !== null && matches(cell, "attack"));
  const shared = ["family", ...PLACE.filter((key) => key !== "attack")];
  const families = groups(withRatio, ({ facets }) => JSON.stringify(shared.map((key) => facets[key])))
    .filter((family) => new Set(family.map((cell) => cell.place.ratio)).size > 1);
  const settings = groups(shown, (cell) => cell.setting);
  const drawn = [...families.slice(0, MOST_FIGURES).map(drawCurves), ...settings.slice(0, MOST_FIGURES).map(drawScatter)];
  byId("figures").replaceChildren(...drawn);
  const left = families.length + settings.length - drawn.length;
  byId("more-figures").textContent = left ? `${left} more figures: choose fewer attacks, tasks or models.` : "";
}

function highlight({ type, target }) {
  const name = type !== "mouseout" && target.closest?.("[data-defense]")?.dataset.defense;
  const marks = all("#figures [data-defense]");
  marks.forEach((each) => each.classList.toggle("hot", each.dataset.defense === name));
  byId("figures").classList.toggle("lit", marks.some((each) => each.dataset.defense === name));
}

// --- Downloads ---
function exported(cell) {
  const columns = data.columns.filter((key) => !["setting", "published", "deviations", "runs"].includes(key));
  const place = ["protocol", "protocol_hash", "model", "scorer", "task", "attack"].map((key) => [key, cell.place[key]]);
  const runs = cell.runs.map(({ run }) => run).join(" ");
  return Object.fromEntries([...place, ...columns.map((key) => [key, cell[key]]), ["runs", runs]]);
}

function csvCell(value) {
  const content = String(value ?? "");
  const safe = typeof value === "string" && /^'*[=+\-@]/.test(content) ? `'${content}` : content; // not a formula
  return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

const csvText = (rows) => [Object.keys(exported(cells[0])), ...rows.map(Object.values)]
  .map((values) => `${values.map(csvCell).join(",")}\n`).join("");

function download(name, type, content) {
  const link = html("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// --- Events ---
function render() {
  const [shown, focused] = [shownCells(), document.activeElement.id];
  [renderTable, renderFigures].forEach((draw) => draw(shown));
  byId("status").textContent = `${shown.length} of ${cells.length} rows`;
  all("[data-facet]").forEach((chip) => chip.setAttribute("aria-pressed", state.filters[chip.dataset.facet].has(chip.value)));
  if (focused) byId(focused)?.focus({ preventScroll: true });
}

const ACTIONS = {
  reset: () => { location.hash = "all"; },
  csv: () => download("shown.csv", "text/csv", csvText(shownCells().map(exported))),
  json: () => download("shown.json", "application/json", JSON.stringify(shownCells().map(exported), null, 1)),
  skip: () => byId("ranking-title").focus(),
  copy: (button) => navigator.clipboard?.writeText(button.previousElementSibling.textContent),
  open: (button) => { toggle(state.open, button.id.replace("open-", "")); save(); },
  facet: (button) => { toggle(state.filters[button.dataset.facet], button.value); save(); },
  sort: ({ parentNode: { dataset: { key, descending } } }) => {
    const [first, second] = descending === undefined ? [key, `-${key}`] : [`-${key}`, key];
    state.sort = state.sort === first ? second : first;
    save();
  },
};
document.addEventListener("click", ({ target }) => ACTIONS[target.dataset.action]?.(target));
byId("search").addEventListener("input", (event) => { state.q = event.target.value; save(); });
["mouseover", "mouseout", "focusin"].forEach((type) => document.addEventListener(type, highlight));
addEventListener("hashchange", () => { load(); render(); });
load();
render();
byId(`cell-${[...state.open][0]}`)?.scrollIntoView({ block: "center" });
