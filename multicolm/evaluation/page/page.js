"use strict";
// Texts of models reach the page as text nodes only; nothing here parses HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.rows;
const answers = data.answers.map(([row, question, quality, finish, text, length], id) =>
  ({ id, row, question, quality, finish, text, length }));
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}
const el = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

const percent = (value) => `${(100 * value).toFixed(1)} %`;
const chance = (value) =>
  typeof value !== "number" ? String(value) : value > 0 && value < 0.0001 ? "<0.0001" : value.toFixed(value > 0.9999 && value < 1 ? 5 : 4);
const sum = (values) => values.reduce((a, b) => a + b, 0);
const writerName = (writer) => writer < 0 ? "mixture" : data.models[writer];
const writerClass = (writer) => writer < 0 ? data.mixture : data.writers[writer];

// ---- text ---------------------------------------------------------------------------------------

const UNSAFE = /[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]/u;

function shownCharacter(character) {
  const code = character.codePointAt(0);
  if (character === "\n") return "⏎";
  if (character === "\t") return "⇥";
  if (code < 32) return String.fromCodePoint(0x2400 + code);
  if (code === 127) return "␡";
  return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

/** Nodes that show a text with what is invisible made visible; a newline shows, then breaks. */
function shown(text, { breaks = true, spaces = false } = {}) {
  const characters = [...text];
  const nodes = [];
  let run = "";
  characters.forEach((character, i) => {
    // A joiner inside an emoji is part of the picture; anywhere else it is something hidden.
    const joins = character === "\u200d" && /\p{Emoji}/u.test(characters[i - 1] || "") && /\p{Emoji}/u.test(characters[i + 1] || "");
    if (joins || !UNSAFE.test(character)) {
      run += spaces && character === " " ? "␣" : character;
      return;
    }
    if (run) nodes.push(run);
    run = "";
    nodes.push(el("span", { class: "ctl" }, shownCharacter(character)));
    if (breaks && (character === "\n" || character === "\t")) run = character;
  });
  if (run) nodes.push(run);
  return nodes;
}

// ---- the table ----------------------------------------------------------------------------------

const table = document.getElementById("results");
const body = table.tBodies[0];
const given = [...body.rows];

function sortBy(column, head) {
  const before = head.getAttribute("aria-sort");
  const first = column === 0 || column === 5 ? "ascending" : "descending";
  const other = first === "ascending" ? "descending" : "ascending";
  const now = before === null ? first : before === first ? other : null;
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  table.classList.toggle("sorted", now !== null);
  if (now === null) return body.append(...given);
  head.setAttribute("aria-sort", now);
  const sign = now === "ascending" ? 1 : -1;
  const key = (row) => row.cells[column].dataset.value;
  const compared = (a, b) => column === 0 ? a.localeCompare(b) : a - b;
  const full = given.filter((row) => key(row) !== undefined);
  const empty = given.filter((row) => key(row) === undefined);
  body.append(...full.sort((a, b) => sign * compared(key(a), key(b))), ...empty);
}

[...table.tHead.rows[0].cells].forEach((head, column) =>
  head.firstElementChild.addEventListener("click", () => sortBy(column, head)));

const lit = new Map(given.map((row) => [Number(row.dataset.row), [row]]));
function light(index, on) {
  for (const node of lit.get(index) || []) node.classList.toggle("lit", on);
}
given.forEach((row) => {
  row.addEventListener("pointerenter", () => light(Number(row.dataset.row), true));
  row.addEventListener("pointerleave", () => light(Number(row.dataset.row), false));
});

// ---- the plot -----------------------------------------------------------------------------------

const plot = document.getElementById("plot");
// Drawn in this order: of one place, a policy is seen around a baseline's ring, a ring around a model.
const RADIUS = { policy: 10, random: 7.5, sweep: 4.5, model: 6 };
const LAYERS = Object.keys(RADIUS);

function ticks(low, high, n) {
  const raw = (high - low) / n;
  const scale = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * scale).find((s) => s >= raw);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
    for (const m of [1, 2, 5]) if (m * 10 ** e >= low && m * 10 ** e <= high) found.push(Number((m * 10 ** e).toPrecision(3)));
  }
  return found;
}

function frontOf(real) {
  const kept = [];
  const rivals = real.filter((row) => row.kind !== "random");
  for (const row of rivals.sort((a, b) => a.cost - b.cost || b.quality - a.quality)) {
    if (!kept.length || row.quality > kept[kept.length - 1].quality) kept.push(row);
  }
  return kept;
}

function pie(row, x, y) {
  const radius = RADIUS[row.kind];
  const parts = [];
  if (row.kind === "model") {
    const writer = row.shares.indexOf(Math.max(...row.shares));
    const side = 1.8 * radius;
    const square = (extra, cls) => svg("rect", { class: cls, x: x - side / 2 - extra, y: y - side / 2 - extra, width: side + 2 * extra, height: side + 2 * extra, rx: 2 + extra / 2 });
    return [square(2, "halo"), square(0, `fill ${data.writers[writer].split(" ")[0]}`), square(3.5, "ring")];
  }
  let start = 0;
  row.shares.forEach((share, i) => {
    if (share <= 0) return;
    const colour = (i < data.writers.length ? data.writers[i] : data.mixture).split(" ")[0];
    if (share > 0.9999) {
      parts.push(svg("circle", { class: `fill ${colour}`, cx: x, cy: y, r: radius }));
    } else {
      const at = (turn) => `${(x + radius * Math.sin(2 * Math.PI * turn)).toFixed(2)} ${(y - radius * Math.cos(2 * Math.PI * turn)).toFixed(2)}`;
      const d = `M${x} ${y}L${at(start)}A${radius} ${radius} 0 ${share > 0.5 ? 1 : 0} 1 ${at(start + share)}Z`;
      parts.push(svg("path", { class: `fill ${colour}`, d }));
    }
    start += share;
  });
  if (row.kind === "random") parts.push(svg("circle", { class: "core", cx: x, cy: y, r: 0.65 * radius }));
  return [svg("circle", { class: "halo", cx: x, cy: y, r: radius + 2 }), ...parts, svg("circle", { class: "ring", cx: x, cy: y, r: radius + 3.5 })];
}

function overlap(a, b) {
  const across = Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x);
  const down = Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y);
  return Math.max(0, across) * Math.max(0, down);
}

/** Where labels go, the best rows' first; null for one that would cover a mark or another label. */
function placed(labels, frame, taken, lines) {
  const sides = [[1, 0], [-1, 0], [0, -1], [0, 1], [0.8, -0.8], [0.8, 0.8], [-0.8, -0.8], [-0.8, 0.8]];
  const boxes = [];
  for (const { x, y, r, width, height } of labels) {
    let best = null;
    for (const far of [4, 10, 20, 34, 50]) {
      sides.forEach(([dx, dy], side) => {
        const box = {
          x: x + dx * (r + far) + Math.sign(dx) * width / 2 - width / 2,
          y: y + dy * (r + far) + Math.sign(dy) * height / 2 - height / 2, width, height,
        };
        const others = [...taken, ...boxes.filter((other) => other !== null)];
        const clash = sum(others.map((other) => overlap(box, other))) + width * height - overlap(box, frame);
        const bad = far + side / 4 + 0.2 * sum(lines.map((other) => overlap(box, other)));
        if (clash <= 1 && (best === null || bad < best.bad)) best = { ...box, bad };
      });
    }
    boxes.push(best);
  }
  return boxes;
}

function along(points) {
  const squares = [];
  for (let i = 1; i < points.length; i++) {
    const [[x0, y0], [x1, y1]] = [points[i - 1], points[i]];
    const n = Math.max(1, Math.floor(Math.hypot(x1 - x0, y1 - y0) / 5));
    for (let k = 0; k <= n; k++) squares.push({ x: x0 + (x1 - x0) * k / n - 2.5, y: y0 + (y1 - y0) * k / n - 2.5, width: 5, height: 5 });
  }
  return squares;
}

/** The last part of a path, where that tells it from the others. */
function labelsOf(named) {
  const last = named.map((row) => row.name.replace(/\/+$/, "").split("/").pop() || row.name);
  return last.map((short, i) => last.filter((other) => other === short).length === 1 ? short : named[i].name);
}

function described(row) {
  const lines = [`${percent(row.quality)} ${data.metric} (${percent(row.low)} to ${percent(row.high)})`];
  if (row.gain !== null) lines.push(`${row.gain < 0 ? "−" : "+"}${Math.abs(100 * row.gain).toFixed(1)} points to the best model alone`);
  lines.push(`cost ${row.cost.toFixed(2)} per token, ${row.speed.toFixed(1)} tokens/s`);
  const written = row.shares.map((share, i) => [share, i < data.models.length ? data.models[i] : "together"]).filter(([share]) => share > 0);
  lines.push(written.map(([share, name]) => `${name} ${percent(share)}`).join(", "));
  return lines;
}

function drawPlot() {
  const tip = el("div", { id: "tip", hidden: true });
  const real = rows.map((row, index) => ({ ...row, index })).filter((row) => row.kind !== "oracle");
  const oracles = rows.filter((row) => row.kind === "oracle");
  if (!real.length) return;
  const width = Math.max(300, plot.clientWidth - 18);
  const height = Math.round(Math.min(480, Math.max(320, width * 0.56)));
  const edge = { left: 44, right: 14, top: 26, bottom: 46 };
  const costs = real.map((row) => row.cost);
  const ends = rows.flatMap((row) => [row.low, row.high, row.quality]);
  const logarithmic = Math.min(...costs) > 0 && Math.max(...costs) / Math.min(...costs) > 20;
  const span = Math.max(...costs) - Math.min(...costs) || Math.max(...costs) || 1;
  const [left, right] = logarithmic
    ? [Math.min(...costs) / 1.3, Math.max(...costs) * 1.5]
    : [Math.max(0, Math.min(...costs) - 0.1 * span), Math.max(...costs) + 0.16 * span];
  const [low, high] = [Math.max(-0.02, Math.min(...ends) - 0.05), Math.min(1.04, Math.max(...ends) + 0.05)];
  const scale = logarithmic ? Math.log : (value) => value;
  const X = (cost) => edge.left + (scale(cost) - scale(left)) / (scale(right) - scale(left)) * (width - edge.left - edge.right);
  const Y = (quality) => height - edge.bottom - (quality - low) / (high - low) * (height - edge.top - edge.bottom);
  const bottom = height - edge.bottom;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `Quality against cost of ${real.length} rows` });
  const taken = [];
  const lines = [];
  const line = (cls, points, group = picture) => {
    lines.push(...along(points));
    group.append(svg("polyline", { class: cls, fill: "none", points: points.map((p) => p.map((v) => v.toFixed(1)).join()).join(" ") }));
  };

  const best = frontOf(real);
  const stairs = [];
  best.forEach((row, i) => {
    stairs.push([X(row.cost), Y(row.quality)], [i + 1 < best.length ? X(best[i + 1].cost) : width - edge.right, Y(row.quality)]);
  });
  if (stairs.length) picture.append(svg("polygon", { class: "band", points: [[stairs[0][0], bottom], ...stairs, [width - edge.right, bottom]].join(" ") }));
  for (const value of ticks(100 * low, 100 * high, 6)) {
    picture.append(svg("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: Y(value / 100), y2: Y(value / 100) }));
    picture.append(svg("text", { x: edge.left - 8, y: Y(value / 100) + 4, "text-anchor": "end" }, String(value)));
  }
  picture.append(svg("line", { class: "axis", x1: edge.left, x2: width - edge.right, y1: bottom, y2: bottom }));
  for (const value of logarithmic ? logTicks(left, right) : ticks(left, right, width / 110)) {
    picture.append(svg("line", { class: "axis", x1: X(value), x2: X(value), y1: bottom, y2: bottom + 4 }));
    picture.append(svg("text", { x: X(value), y: bottom + 18, "text-anchor": "middle" }, String(value)));
  }
  picture.append(svg("text", { x: (edge.left + width - edge.right) / 2, y: height - 8, "text-anchor": "middle" }, "cost per written token"));
  picture.append(svg("text", { x: 6, y: 14 }, `${data.metric}, %`));
  for (const oracle of oracles) {
    const y = Y(oracle.quality);
    picture.append(svg("line", { class: "oracle", x1: edge.left, x2: width - edge.right, y1: y, y2: y }));
    const label = `${oracle.name} ${percent(oracle.quality)}`;
    const box = (top) => ({ x: width - edge.right - 4 - 6.5 * label.length, y: top, width: 6.5 * label.length, height: 15 });
    // Below the line where another's name is above it.
    const top = taken.some((other) => overlap(other, box(y - 18))) ? y + 3 : y - 18;
    picture.append(svg("text", { x: width - edge.right - 4, y: top + 13, "text-anchor": "end" }, label));
    taken.push(box(top));
  }
  line("front", stairs);
  for (const head of real.filter((row) => row.kind === "policy")) {
    const own = (kind) => real.filter((row) => row.kind === kind && row.of === head.name);
    const curve = [head, ...own("sweep")].sort((a, b) => a.cost - b.cost || a.quality - b.quality);
    if (curve.length > 1) line("curve", curve.map((row) => [X(row.cost), Y(row.quality)]));
  }
  for (const row of real) line("error", [[X(row.cost), Y(row.low)], [X(row.cost), Y(row.high)]]);

  plot.replaceChildren(picture, tip);
  const shownRows = real.filter((row) => row.kind === "policy" || row.kind === "model").sort((a, b) => b.quality - a.quality);
  const names = labelsOf(shownRows);
  const labels = shownRows.map((row, i) => {
    const words = svg("text", { class: "name", "aria-hidden": "true" }, ...shown(names[i], { breaks: false }).map((node) => typeof node === "string" ? node : node.textContent));
    const holder = svg("g", { class: row.kind }, words);
    picture.append(holder);
    const size = words.getBBox();
    return { holder, words, x: X(row.cost), y: Y(row.quality), r: RADIUS[row.kind], width: size.width, height: size.height };
  });
  for (const row of real) {
    const r = RADIUS[row.kind];
    taken.push({ x: X(row.cost) - r, y: Y(row.quality) - r, width: 2 * r, height: 2 * r });
  }
  const frame = { x: edge.left, y: edge.top, width: width - edge.left - edge.right, height: bottom - edge.top };
  placed(labels, frame, taken, lines).forEach((box, i) => {
    const { holder, words, x, y, r } = labels[i];
    // A mark without room for its name says it when it is pointed at.
    if (box === null) return holder.remove();
    words.setAttribute("x", box.x);
    words.setAttribute("y", box.y + 0.78 * box.height);
    const nearX = Math.min(Math.max(x, box.x), box.x + box.width);
    const nearY = Math.min(Math.max(y, box.y), box.y + box.height);
    if (Math.hypot(nearX - x, nearY - y) > r + 14) holder.prepend(svg("line", { class: "leader", x1: x, y1: y, x2: nearX, y2: nearY }));
  });
  // Marks go on top; the tab key walks along kinds, and in each along the cost.
  for (const row of [...real].sort((a, b) => LAYERS.indexOf(a.kind) - LAYERS.indexOf(b.kind) || a.cost - b.cost)) {
    const [x, y] = [X(row.cost), Y(row.quality)];
    const mark = svg("g", { class: `mark ${row.kind}`, tabindex: 0, role: "button", "data-row": row.index, "aria-label": [row.name, ...described(row)].join(". ") }, ...pie(row, x, y));
    const enter = () => {
      tip.replaceChildren(el("b", {}, ...shown(row.name, { breaks: false })), ...described(row).map((words) => el("span", {}, words)));
      tip.hidden = false;
      const ratio = picture.clientWidth / width;
      const space = plot.clientWidth - tip.offsetWidth - 8;
      tip.style.left = `${Math.max(8, Math.min(space, x * ratio - tip.offsetWidth / 2))}px`;
      const above = y * ratio - tip.offsetHeight - 12;
      tip.style.top = `${above > 0 ? above : y * ratio + 30}px`;
      light(row.index, true);
    };
    const leave = () => { tip.hidden = true; light(row.index, false); };
    mark.addEventListener("pointerenter", enter);
    mark.addEventListener("focus", enter);
    mark.addEventListener("pointerleave", leave);
    mark.addEventListener("blur", leave);
    mark.addEventListener("click", () => openRow(row.index));
    mark.addEventListener("keydown", (event) => { if (event.key === "Enter") openRow(row.index); if (event.key === "Escape") leave(); });
    picture.append(mark);
    const tableRow = lit.get(row.index)[0];
    lit.set(row.index, [tableRow, mark]);
  }
}

let drawnAt = -1;
function redraw() {
  if (plot.clientWidth === drawnAt) return;
  drawnAt = plot.clientWidth;
  drawPlot();
}
if (rows.some((row) => row.kind !== "oracle")) {
  redraw();
  new ResizeObserver(redraw).observe(plot);
} else {
  document.getElementById("plot-section").hidden = true;
}

// ---- the texts ----------------------------------------------------------------------------------

const browser = document.getElementById("browser");
const traced = rows.map((_, i) => i).filter((i) => answers.some((answer) => answer.row === i));
const byPlace = new Map(answers.map((answer) => [`${answer.row}/${answer.question}`, answer]));
const find = (row, question) => byPlace.get(`${row}/${question}`);
const isRight = (answer) => answer.quality >= 0.5;
const loaded = new Map();
function tokensOf(answer) {
  if (!loaded.has(answer.id)) loaded.set(answer.id, JSON.parse(document.getElementById(`answer-${answer.id}`).textContent));
  return loaded.get(answer.id);
}

const FILTERS = {
  all: ["all answers", () => true],
  right: ["right", (a) => isRight(a)],
  wrong: ["wrong", (a) => !isRight(a)],
  won: ["right, and the other wrong", (a, b) => isRight(a) && b && !isRight(b)],
  lost: ["wrong, and the other right", (a, b) => !isRight(a) && b && isRight(b)],
};

const rowOptions = () => traced.map((i) => el("option", { value: i }, rows[i].name));
const ui = {
  row: el("select", { id: "row" }, ...rowOptions()),
  other: el("select", { id: "other" }, el("option", { value: "" }, "nothing"), ...rowOptions()),
  filter: el("select", { id: "filter" }, ...Object.entries(FILTERS).map(([value, [words]]) => el("option", { value }, words))),
  search: el("input", { id: "search", type: "search", placeholder: "in prompts and texts", autocomplete: "off" }),
  question: el("select", { id: "question" }),
  back: el("button", { type: "button", "aria-label": "Previous question" }, "←"),
  next: el("button", { type: "button", "aria-label": "Next question" }, "→"),
  seams: el("input", { type: "checkbox", id: "seams" }),
  count: el("span", { class: "count", role: "status", id: "count" }),
  prompt: el("dl", { class: "question" }),
  answers: el("div", { class: "answers" }),
  panel: el("aside", { class: "panel card idle", "aria-live": "polite", "aria-label": "The selected token", id: "panel" }),
};

function matching() {
  const row = Number(ui.row.value);
  const other = ui.other.value === "" ? null : Number(ui.other.value);
  const words = ui.search.value.toLowerCase();
  const passes = FILTERS[ui.filter.value][1];
  return answers.filter((answer) => {
    if (answer.row !== row) return false;
    const rival = other === null ? undefined : find(other, answer.question);
    if (!passes(answer, rival)) return false;
    const texts = [...data.questions[answer.question], answer.text, rival ? rival.text : ""];
    return !words || texts.some((text) => text.toLowerCase().includes(words));
  }).map((answer) => answer.question);
}

function list() {
  const before = ui.question.value;
  const questions = matching();
  ui.question.replaceChildren(...questions.map((question) =>
    el("option", { value: question }, shown(data.questions[question][0], { breaks: false }).map((n) => n.textContent ?? n).join(""))));
  if (questions.includes(Number(before)) && before !== "") ui.question.value = before;
  for (const filter of ["won", "lost"]) ui.filter.querySelector(`[value=${filter}]`).disabled = ui.other.value === "";
  show();
}

function show() {
  const options = ui.question.options.length;
  const at = ui.question.selectedIndex;
  ui.count.textContent = options ? `${at + 1} of ${options}` : "no answer passes the filters";
  ui.back.disabled = at <= 0;
  ui.next.disabled = at + 1 >= options;
  idle();
  if (!options) {
    ui.prompt.hidden = true;
    ui.answers.replaceChildren();
    return;
  }
  const question = Number(ui.question.value);
  const [, prompt, gold] = data.questions[question];
  ui.prompt.hidden = false;
  ui.prompt.replaceChildren(
    el("dt", {}, "Prompt"), el("dd", { class: "plain", dir: "auto" }, ...shown(prompt)),
    el("dt", {}, "Right answer"), el("dd", { class: "plain", dir: "auto" }, ...shown(gold)));
  const chosen = [Number(ui.row.value), ...(ui.other.value === "" ? [] : [Number(ui.other.value)])];
  ui.answers.replaceChildren(...chosen.map((row) => card(row, find(row, question))));
  remember(question);
}

function card(row, answer) {
  const title = el("h3", {}, ...shown(rows[row].name, { breaks: false }));
  if (!answer) return el("article", { class: "answer card" }, title, el("p", { class: "empty" }, "No answer to this question was kept."));
  const tokens = tokensOf(answer);
  const right = isRight(answer);
  const whole = answer.quality === 0 || answer.quality === 1;
  const verdict = `${right ? "✓ right" : "✗ wrong"}${whole ? "" : ` (${percent(answer.quality)})`}`;
  const writers = [...new Set(tokens.map((token) => token[1]))];
  const shares = writers.map((writer) => `${writerName(writer)} ${tokens.filter((token) => token[1] === writer).length}`);
  const text = el("div", { class: `text${ui.seams.checked ? " seams" : ""}`, role: "group", dir: "auto", "aria-label": `Text of ${rows[row].name}, by tokens` });
  tokens.forEach((token, i) => text.append(button(token, i, tokens.length)));
  if (!tokens.length) text.append(el("span", { class: "empty" }, "The text is empty."));
  text.addEventListener("click", (event) => { const node = event.target.closest(".token"); if (node) select(node, tokens); });
  text.addEventListener("keydown", (event) => walk(event, tokens));
  const ending = `${answer.length} token${answer.length === 1 ? "" : "s"}${shares.length ? ` (${shares.join(", ")})` : ""}, ended by ${answer.finish}`;
  return el("article", { class: "answer card" }, title,
    el("p", { class: "meta" }, el("span", { class: `badge ${right ? "right" : "wrong"}` }, verdict), ` · ${ending}`), text);
}

function button([text, writer], i, n) {
  const label = `${text === "" ? "part of a character" : shown(text, { breaks: false, spaces: false }).map((x) => x.textContent ?? x).join("")}, ${writerName(writer)}, token ${i + 1} of ${n}`;
  // A span: a real button is a box that no line can break inside, and words end up torn apart.
  return el("span", { class: `token ${writerClass(writer)}`, role: "button", tabindex: i === 0 ? 0 : -1, "aria-pressed": "false", "aria-label": label, "data-i": i },
    ...(text === "" ? [el("span", { class: "ctl" }, "▫")] : shown(text)));
}

function walk(event, tokens) {
  const node = event.target.closest(".token");
  if (!node) return;
  const all = [...node.parentElement.querySelectorAll(".token")];
  const at = all.indexOf(node);
  const goal = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (event.key === "Enter" || event.key === " ") select(node, tokens);
  else if (event.key === "Escape") idle();
  else if (goal === undefined) return;
  else if (all[goal]) { all[goal].focus(); select(all[goal], tokens); }
  event.preventDefault();
}

function idle() {
  for (const node of browser.querySelectorAll('.token[aria-pressed="true"]')) node.setAttribute("aria-pressed", "false");
  ui.panel.className = "panel card idle";
  ui.panel.replaceChildren(el("p", { class: "empty" }, answers.length ? "Select a token to see what every model would have written there." : ""));
}

function select(node, tokens) {
  for (const other of browser.querySelectorAll(".token")) other.setAttribute("aria-pressed", "false");
  for (const other of node.parentElement.querySelectorAll(".token")) other.tabIndex = -1;
  node.setAttribute("aria-pressed", "true");
  node.tabIndex = 0;
  ui.panel.className = "panel card";
  const close = el("button", { class: "close", type: "button", "aria-label": "Close" }, "×");
  close.addEventListener("click", () => { idle(); node.focus({ preventScroll: true }); });
  ui.panel.replaceChildren(close, ...details(tokens[Number(node.dataset.i)], Number(node.dataset.i), tokens.length));
  // On a narrow screen the panel lies over the lower part of the text.
  if (getComputedStyle(ui.panel).bottom !== "auto") node.scrollIntoView({ block: "nearest" });
}

const piece = (text) => el("span", { class: "piece", title: null }, ...(text === "" ? ["(no character yet)"] : shown(text, { breaks: false, spaces: true })));

function bar(words, value, colour, chosen) {
  const width = typeof value === "number" ? 100 * Math.min(1, Math.max(0, value)) : 0;
  const picture = svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: "rail", width: 100, height: 10 }), svg("rect", { class: `bar ${colour}`, width, height: 10 }));
  return el("li", {}, el("span", { class: chosen ? "chosen" : "" }, words), picture, el("span", { class: `number${chosen ? " chosen" : ""}` }, chance(value)));
}

function details([text, writer, logprob, score, looks, chances], i, n) {
  const pairs = [["Written by", el("span", { class: `swatch ${writerClass(writer)}` }, writerName(writer))],
    ["Probability", logprob === null ? "not known" : `${chance(typeof logprob === "number" ? Math.exp(logprob) : logprob)} (${typeof logprob === "number" ? logprob.toFixed(3) : logprob} nats)`]];
  if (score !== null) pairs.push(["Policy's score", typeof score === "number" ? Number(score.toPrecision(4)).toString() : score]);
  const nodes = [el("h3", {}, piece(text)), el("p", { class: "note" }, `Token ${i + 1} of ${n}`),
    el("dl", {}, ...pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]))];
  const first = (k) => data.writers[k].split(" ")[0];
  if (chances.length) {
    nodes.push(el("h4", {}, "Who the policy lets write"),
      el("ul", { class: "bars" }, ...data.models.map((name, k) => [name, k]).filter(([, k]) => chances[k] !== null)
        .map(([name, k]) => bar(name, chances[k], first(k), k === writer))));
  }
  data.models.forEach((name, k) => {
    nodes.push(el("h4", {}, el("span", { class: `swatch ${data.writers[k]}` }, name)));
    const look = looks[k];
    if (!look) return nodes.push(el("p", { class: "empty" }, "did not run here"));
    const [own, top] = look;
    const among = top.some(([other]) => other === text);
    const items = top.map(([other, value]) => bar(piece(other), value, first(k), other === text));
    if (!among && own !== null) items.push(bar(piece(text), typeof own === "number" ? Math.exp(own) : own, first(k), true));
    nodes.push(el("ul", { class: "bars", "aria-label": `Likeliest tokens of ${name}` }, ...items));
    if (own === null) nodes.push(el("p", { class: "note" }, "cannot write this token"));
  });
  return nodes;
}

// The address holds what is shown, so that a link leads to it.
function remember(question) {
  const state = new URLSearchParams({ row: rows[ui.row.value].name, question: data.questions[question][0] });
  if (ui.other.value !== "") state.set("with", rows[ui.other.value].name);
  if (moved) history.replaceState(null, "", `#${state}`);
}
let moved = false;

function restore() {
  const state = new URLSearchParams(location.hash.slice(1));
  const place = (name) => traced.find((i) => rows[i].name === state.get(name));
  if (place("row") === undefined) return false;
  ui.row.value = place("row");
  if (place("with") !== undefined) ui.other.value = place("with");
  list();
  const question = data.questions.findIndex(([id], k) => id === state.get("question") && find(Number(ui.row.value), k));
  if (question >= 0) { ui.question.value = question; show(); }
  return true;
}

function openRow(index) {
  if (!traced.includes(index)) return;
  moved = true;
  ui.row.value = index;
  list();
  document.getElementById("texts").scrollIntoView({ block: "start" });
}

function step(by) {
  moved = true;
  ui.question.selectedIndex += by;
  show();
}

function start() {
  if (!answers.length) {
    browser.append(el("p", { class: "empty" }, "No texts were kept for this report."));
    return;
  }
  const label = (words, node) => el("label", {}, words, node);
  browser.append(
    el("div", { class: "controls" }, label("Row", ui.row), label("Beside it", ui.other), label("Show", ui.filter), label("Search", ui.search),
      el("div", { class: "step" }, label("Question", ui.question), ui.back, ui.next), ui.count,
      el("label", { class: "check" }, ui.seams, "mark where tokens begin")),
    ui.prompt, el("div", { class: "stage" }, ui.answers, ui.panel));
  // The row with the most to see: the best policy whose texts were kept.
  const policies = traced.filter((i) => rows[i].kind === "policy" && rows[i].shares.filter((share) => share > 0).length > 1);
  if (policies.length) ui.row.value = policies.reduce((a, b) => rows[b].quality > rows[a].quality ? b : a);
  for (const node of [ui.row, ui.other, ui.filter]) node.addEventListener("change", () => { moved = true; list(); });
  ui.other.addEventListener("change", () => { if (ui.other.value === "" && ["won", "lost"].includes(ui.filter.value)) { ui.filter.value = "all"; list(); } });
  ui.search.addEventListener("input", list);
  ui.question.addEventListener("change", () => { moved = true; show(); });
  ui.back.addEventListener("click", () => step(-1));
  ui.next.addEventListener("click", () => step(1));
  ui.seams.addEventListener("change", () => browser.querySelectorAll(".text").forEach((node) => node.classList.toggle("seams", ui.seams.checked)));
  addEventListener("hashchange", restore);
  if (!restore()) list();
}
start();
