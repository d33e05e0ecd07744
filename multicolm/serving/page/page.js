"use strict";

const $ = (id) => document.getElementById(id);
const N_COLOURS = 6;
const N_UNDERLINES = 4;
const N_LIKELIEST = 5;  // tokens that might have been written, shown for the one that was

let menu = [];        // what /v1/models says
let names = [];       // the models, the base model first
let running = null;   // stops the text that is being written

// The text as it comes: its characters, and its tokens with the places where they begin.
let characters = [];
let tokens = [];
let spans = [];
let whole = 0;        // so many spans at the front show all that they ever will
let picked = -1;

function writerClass(name) {
  const index = names.indexOf(name);
  if (index < 0) return "wx ux";
  if (index === 0) return "w0";
  return `w${(index - 1) % N_COLOURS + 1} u${(index - 1) % N_UNDERLINES + 1}`;
}

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

function headers() {
  const key = $("key").value;
  const given = { "Content-Type": "application/json" };
  if (key) given.Authorization = `Bearer ${key}`;
  return given;
}

async function complaint(reply) {
  if (reply.status === 401) $("key-box").hidden = false;
  try {
    return (await reply.json()).error.message;
  } catch {
    return `the server answered ${reply.status}.`;
  }
}

async function loadMenu() {
  let reply;
  try {
    reply = await fetch("/v1/models", { headers: headers() });
  } catch {
    say("The server does not answer.", true);
    return;
  }
  if (!reply.ok) {
    say(await complaint(reply), true);
    return;
  }
  menu = (await reply.json()).data;
  names = menu[0].multicolm.models;
  document.title = `${menu[0].id} · multicolm`;
  $("title").textContent = menu[0].id;
  $("legend").replaceChildren(...names.map((name, i) => {
    const item = element("li");
    item.append(element("span", `swatch ${writerClass(name)}`, name), " ",
      element("small", "", i ? "assistant" : "base model"));
    return item;
  }));
  $("policy").replaceChildren(...menu.map((entry, i) => {
    const known = entry.multicolm;
    const option = element("option", "", i ? known.policy : `${known.kind} (the ensemble's own)`);
    option.value = String(i);
    return option;
  }));
  showPolicy();
  say("");
}

function showPolicy() {
  const entry = menu[Number($("policy").value)];
  $("policy-summary").textContent = entry ? entry.multicolm.summary : "";
  $("threshold-box").hidden = !(entry && entry.multicolm.threshold);
  $("threshold").value = "";
}

function request() {
  const entry = menu[Number($("policy").value)];
  const body = {
    model: entry.id,
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number($("temperature").value),
    max_tokens: Number($("length").value),
  };
  if (!$("threshold-box").hidden && $("threshold").value !== "") {
    body.model += `@${Number($("threshold").value)}`;
  }
  const prompt = $("prompt").value;
  const n = Math.min(N_LIKELIEST, entry.multicolm.top_logprobs);
  if ($("manner").value === "chat") {
    body.messages = [{ role: "user", content: prompt }];
    if (n) Object.assign(body, { logprobs: true, top_logprobs: n });
  } else {
    body.prompt = prompt;
    if (n) body.logprobs = n;
  }
  return ["messages" in body ? "/v1/chat/completions" : "/v1/completions", body];
}

async function write() {
  if (running || !menu.length) return;
  characters = []; tokens = []; spans = []; whole = 0; picked = -1;
  $("text").replaceChildren();
  $("detail").replaceChildren();
  $("usage").textContent = "";
  running = new AbortController();
  busy(true);
  say("Writing…");
  const start = performance.now();
  try {
    const [address, body] = request();
    const reply = await fetch(address, {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!reply.ok) throw new Error(await complaint(reply));
    for await (const event of events(reply.body)) take(event, start);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(error instanceof TypeError ? "The connection to the server broke off." : error.message, true);
  } finally {
    running = null;
    busy(false);
  }
}

function busy(is) {
  $("go").disabled = is;
  $("stop").disabled = !is;
  $("text").setAttribute("aria-busy", String(is));
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function take(event, start) {
  if (event.error) throw new Error(event.error.message);
  for (const choice of event.choices) {
    const added = choice.multicolm;
    if (!added) continue;
    for (const piece of added.pieces) characters.push(...piece.text);
    tokens.push(...added.tokens);
    show();
    if (choice.finish_reason) say(ending(added.finish_reason));
  }
  if (event.usage) showUsage(event, (performance.now() - start) / 1000);
}

const ENDINGS = {
  eos: "The writer ended the text.", stop: "A stop text came.",
  length: "The most tokens are written.", context: "A model's context is full.",
};
const ending = (reason) => ENDINGS[reason] || reason;

// A token's characters end where the next token begins; those that are not certain yet are not here.
function show() {
  while (spans.length < tokens.length) {
    const i = spans.length;
    const span = element("span", `token ${writerClass(tokens[i].model)}`);
    span.addEventListener("mouseenter", () => pick(i));
    spans.push(span);
    $("text").append(span);
  }
  for (let i = whole; i < spans.length; i += 1) {
    const isLast = i + 1 === tokens.length;
    const end = isLast ? characters.length : tokens[i + 1].offset;
    spans[i].textContent = characters.slice(tokens[i].offset, end).join("");
    if (!isLast && end <= characters.length && i === whole) whole += 1;
  }
}

function pick(i) {
  if (picked >= 0) spans[picked].classList.remove("picked");
  picked = i;
  spans[i].classList.add("picked");
  const token = tokens[i];
  const facts = [["token", JSON.stringify(token.text)], ["by", token.model]];
  if (token.logprob !== null) {
    facts.push(["probability", percent(token.logprob)]);
    facts.push(["log-probability", `${token.logprob.toFixed(3)} nats`]);
  }
  if (token.score !== null) facts.push(["policy's score", token.score.toPrecision(4)]);
  $("detail").replaceChildren(...facts.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", "", name), element("dd", "", value));
    return pair;
  }), ...likeliest(token));
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toPrecision(3)} %`;

// What the writer might have written, as bars on one scale.
function likeliest(token) {
  if (!token.alternatives || !token.alternatives.length) return [];
  const list = element("ol", `likeliest ${writerClass(token.model).split(" ")[0]}`);
  list.setAttribute("aria-label", "the likeliest tokens here");
  list.append(...token.alternatives.map((other) => {
    const item = element("li", other.id === token.id ? "written" : "");
    const bar = element("span", "bar");
    bar.style.width = `${100 * Math.exp(other.logprob)}%`;
    item.append(element("code", "", JSON.stringify(other.text)), bar, element("span", "", percent(other.logprob)));
    return item;
  }));
  return [list];
}

function walk(event) {
  const steps = { ArrowRight: picked + 1, ArrowLeft: picked - 1, Home: 0, End: spans.length - 1 };
  if (!(event.key in steps) || !spans.length) return;
  event.preventDefault();
  pick(Math.min(spans.length - 1, Math.max(0, steps[event.key])));
  spans[picked].scrollIntoView({ block: "nearest" });
}

function showUsage(event, seconds) {
  const used = event.multicolm.usage;
  const n = event.usage.completion_tokens;
  const parts = Object.entries(used).map(([name, u]) =>
    `${name} wrote ${u.tokens_written} and read ${u.tokens_read} tokens in ${u.forwards} passes`);
  const mixed = n - Object.values(used).reduce((sum, u) => sum + u.tokens_written, 0);
  if (mixed) parts.push(`${mixed} were written together`);
  $("usage").textContent = `${n} tokens in ${seconds.toFixed(2)} s · ${parts.join(" · ")}`;
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); write(); });
$("stop").addEventListener("click", () => running && running.abort());
$("policy").addEventListener("change", showPolicy);
$("key").addEventListener("change", loadMenu);
$("text").addEventListener("keydown", walk);
$("text").addEventListener("focus", () => { if (picked < 0 && spans.length) pick(0); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
  if (event.key === "Enter" && event.ctrlKey) { event.preventDefault(); $("form").requestSubmit(); }
});
loadMenu();
