"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const known = values => values.filter(v => v !== null);
const unit = data.pixelSize === null ? "px" : "Å";
const length = px => px === null ? null : px * (data.pixelSize ?? 1);

// ---- charts: lines, columns and marks on axes from 0 or from the lowest value

function svg(parent, name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return parent.appendChild(element);
}

function ticks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-6); i * step <= high + 1e-6 * step; i++) found.push(i * step);
  return found;
}

const short = value => String(parseFloat(value.toPrecision(5)));
const percent = value => short(100 * value) + " %";

/* spec: title, note, x and y {label, range, format, whole}, lines [{points [[x, y]], kind}], columns {edges, values},
   marks [{x or y, kind, text}] */
function chart(id, spec) {
  const figure = byId(id), width = Math.min(Math.max(figure.clientWidth || 400, 260), 560), height = width * 0.58;
  const caption = document.createElement("figcaption"), note = document.createElement("span");
  caption.textContent = spec.title + " ";
  note.textContent = spec.note ?? "";
  caption.append(note);
  figure.replaceChildren(caption);
  const left = 52, right = width - 10, top = 16, bottom = height - 34;
  const [x0, x1] = spec.x.range, [y0, y1] = spec.y.range;
  const px = x => left + (x - x0) / (x1 - x0 || 1) * (right - left), py = y => bottom - (y - y0) / (y1 - y0 || 1) * (bottom - top);
  const root = svg(figure, "svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${spec.title} ${spec.note ?? ""}`});
  for (const y of ticks(y0, y1, 4)) {
    svg(root, "line", {class: "grid", x1: left, x2: right, y1: py(y), y2: py(y)});
    svg(root, "text", {x: left - 6, y: py(y) + 4, "text-anchor": "end"}, (spec.y.format ?? short)(y));
  }
  for (const x of ticks(x0, x1, spec.x.most ?? 6).filter(x => !spec.x.whole || Number.isInteger(x)))
    svg(root, "text", {x: px(x), y: bottom + 15, "text-anchor": "middle"}, (spec.x.format ?? short)(x));
  svg(root, "line", {class: "axis", x1: left, x2: right, y1: bottom, y2: bottom});
  svg(root, "text", {x: (left + right) / 2, y: height - 4, "text-anchor": "middle"}, spec.x.label);
  if (spec.columns) spec.columns.values.forEach((v, i) => {
    const from = px(spec.columns.edges[i]), to = px(spec.columns.edges[i + 1]);
    svg(root, "rect", {class: "column", x: from + 0.5, width: Math.max(to - from - 1, 0.5), y: py(v), height: Math.max(bottom - py(v), 0)});
  });
  for (const {points, kind} of spec.lines ?? []) {
    let path = "", broken = true;
    for (const [x, y] of points) {
      if (y === null) { broken = true; continue; }
      path += `${broken ? "M" : "L"}${px(x).toFixed(1)} ${py(Math.min(Math.max(y, y0), y1)).toFixed(1)}`;
      broken = false;
    }
    svg(root, "path", {class: `curve ${kind ?? ""}`, d: path});
    if (points.length <= 20) for (const [x, y] of points)
      if (y !== null) svg(root, "circle", {class: `dot ${kind ?? ""}`, cx: px(x), cy: py(y), r: 2.5});
  }
  for (const {x, y, kind, text} of spec.marks ?? []) {
    const at = y === undefined ? {x1: px(x), x2: px(x), y1: top, y2: bottom} : {x1: left, x2: right, y1: py(y), y2: py(y)};
    svg(root, "line", {class: kind, ...at});
    if (text) svg(root, "text", y === undefined ? {x: px(x), y: top - 5, "text-anchor": "middle"} : {x: right, y: py(y) - 4, "text-anchor": "end"}, text);
  }
}

const spread = values => {
  const low = Math.min(...values), high = Math.max(...values), room = (high - low) * 0.08 || Math.abs(high) * 0.05 || 1;
  return [low - room, high + room];
};
const upTo = values => [0, Math.max(...values, 0) * 1.08 || 1];
const course = values => values.map((value, i) => [i, value]);
const nIterations = data.criterion.length;
const iterations = {label: "iteration", range: [0, Math.max(nIterations - 1, 1)], whole: true};
const resolutionRange = values => values.length ? spread(values) : [0, 1];
// what particles did in the first iteration is no change: none had a class
const withoutFirst = values => values.map((value, i) => i === 0 ? null : value);
const middle = rows => rows[0].map((_, i) => {
  const sorted = known(rows.map(row => row[i])).sort((a, b) => a - b), half = Math.floor(sorted.length / 2);
  return sorted.length ? (sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2) : null;
});

function drawRun() {
  const classes = data.classes, many = classes.length > 1 ? "many" : "";
  chart("chart-criterion", {title: "Criterion", note: "which should grow", x: iterations,
    y: {range: spread(data.criterion)}, lines: [{points: course(data.criterion)}]});
  const changed = withoutFirst(data.criterion.map((_, i) => classes.reduce((sum, c) => sum + c.changed[i], 0) / data.nParticles));
  chart("chart-changed", {title: "Particles that changed class", x: iterations,
    note: nIterations > 1 ? "which should fall" : "none: in the first iteration no particle had a class",
    y: {range: upTo(known(changed)), format: percent}, lines: [{points: course(changed)}]});
  const sizes = classes.map(c => c.counts);
  chart("chart-counts", {title: "Particles of each class", note: many && "thick: the median", x: iterations, y: {range: upTo(sizes.flat())},
    lines: [...sizes.map(row => ({points: course(row), kind: many})), ...(many ? [{points: course(middle(sizes))}] : [])]});
  const periods = classes.map(c => c.res05.map(length));
  chart("chart-resolution", {title: `Resolution at FRC 0.5, ${unit}`, note: many && "thick: the median", x: iterations,
    y: {range: resolutionRange(known(periods.flat()))},
    lines: [...periods.map(row => ({points: course(row), kind: many})), ...(many ? [{points: course(middle(periods))}] : [])]});
  for (const shifts of data.shifts) chart(`chart-${shifts.axis}`, {
    title: `Middle of the particle in ${shifts.axis}`, note: "share of the particles",
    x: {label: `${shifts.axis}, px`, range: [Math.min(shifts.edges[0], ...shifts.limit), Math.max(shifts.edges.at(-1), ...shifts.limit)]},
    y: {range: upTo(shifts.shares), format: percent}, columns: {edges: shifts.edges, values: shifts.shares},
    marks: [...shifts.reach.map(x => ({x, kind: "dashed"})), ...shifts.limit.map(x => ({x, kind: "solid"}))]});
  chart("chart-angles", {title: "Angle", note: `share of the particles; ${percent(data.angles.mirrored)} are mirrored`,
    x: {label: "alpha, degrees", range: [0, 360], most: 8}, y: {range: upTo(data.angles.shares), format: percent},
    columns: {edges: data.angles.edges, values: data.angles.shares}});
}

// ---- the wall and its order

const wall = byId("wall");

function sortWall(order) {
  const items = [...wall.children];
  items.sort((a, b) => (order === "size" ? b.dataset.count - a.dataset.count : 0) || a.dataset.number - b.dataset.number);
  wall.append(...items);
  wall.dataset.order = order;
}

for (const input of document.querySelectorAll("input[name=order]")) input.addEventListener("change", () => {
  sortWall(input.value);
  history.replaceState(null, "", input.value === "size" ? "#" : "#by-number");
});
if (location.hash === "#by-number") {
  document.querySelector("input[value=number]").checked = true;
  sortWall("number");
}

// ---- a single class

const single = byId("single");
let shown = null;

function show(number) {
  shown = number;
  const c = data.classes[number], tile = byId(`class-${number}`), picture = tile.querySelector("img");
  byId("single-title").textContent = `Class ${number}`;
  byId("single-picture").hidden = picture === null;
  byId("single-gone").hidden = picture !== null;
  if (picture !== null) {
    byId("single-picture").src = picture.src;
    byId("single-picture").alt = picture.alt;
  }
  byId("single-facts").textContent = tile.parentElement.dataset.facts;
  if (!single.open) single.showModal();
  drawSingle(c);
  if (byId("single-members")) showMembers(c.members);
}

function drawSingle(c) {
  chart("single-frc", {title: "FRC of the two halves", note: c.frc[1] === null ? "none for a class that vanished" : `period in ${unit}`,
    x: {label: `period, ${unit}`, range: [0, 0.5], most: 5, format: f => f === 0 ? "∞" : length(1 / f).toFixed(1)},
    y: {range: [Math.min(0, ...known(c.frc)), 1]}, lines: [{points: c.frc.map((v, i) => [data.frequency[i], v])}],
    marks: [{y: 0.5, kind: "level", text: "0.5"}, {y: 0.143, kind: "level", text: "0.143"}]});
  chart("single-counts", {title: "Particles", x: iterations, y: {range: upTo(c.counts)}, lines: [{points: course(c.counts)}]});
  chart("single-changed", {title: "Came from another class", x: iterations, y: {range: upTo(c.changed.slice(1))},
    lines: [{points: course(withoutFirst(c.changed))}]});
  chart("single-resolution", {title: `Resolution, ${unit}`, note: "FRC 0.5 teal, 0.143 brown", x: iterations,
    y: {range: resolutionRange(known([...c.res05, ...c.res0143]).map(length))},
    lines: [{points: course(c.res05.map(length))}, {points: course(c.res0143.map(length)), kind: "second"}]});
}

function showMembers(members) {
  byId("single-members").hidden = members === null;
  byId("single-none").hidden = members !== null;
  if (members === null) return;
  byId("single-moved").src = members.moved;
  byId("single-raw").src = members.raw;
  byId("single-indices").replaceChildren(...members.indices.map((index, i) => {
    const item = document.createElement("li");
    item.textContent = index;
    item.title = `particle ${index}, peak ${members.peaks[i].toPrecision(4)}`;
    return item;
  }));
}

function step(by) {
  const order = [...wall.children].map(item => Number(item.dataset.number));
  show(order[(order.indexOf(shown) + by + order.length) % order.length]);
}

wall.addEventListener("click", event => {
  const tile = event.target.closest(".tile");
  if (tile) show(Number(tile.parentElement.dataset.number));
});
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("close").addEventListener("click", () => single.close());
single.addEventListener("click", event => { if (event.target === single) single.close(); });
single.addEventListener("keydown", event => {
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    event.preventDefault();
    step(event.key === "ArrowLeft" ? -1 : 1);
  }
});
single.addEventListener("close", () => byId(`class-${shown}`).focus());

drawRun();
if (document.body.hasAttribute("data-live"))
  setInterval(() => { if (!single.open && !document.hidden) location.reload(); }, 15000);
