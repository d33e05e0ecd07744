"use strict";

const $ = (id) => document.getElementById(id);
const N_COLOURS = 6;
const N_UNDERLINES = 4;
const N_LIKELIEST = 5;  // tokens that might have been written, shown for the one that was

let menu = [];        // what /v1/models says
let names = [];       // the models, the base model first
let running = null;   // stops the text that is being written

let turns = [];       // of the chat so far: what was asked, and its answer

// An answer while it comes: its characters, and its tokens with the places where they begin.
class Answer {
  constructor(node) {
    this.node = node;
    this.characters = [];
    this.tokens = [];
    this.spans = [];
    this.whole = 0;   // so many spans at the front show all that they ever will
    this.picked = -1;
  }

  part(name) { return this.node.querySelector(`.${name}`); }
}

let answer = null;    // the last one

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
  $("mode").value = menu[0].multicolm.chat ? "chat" : "text";
  showPolicy();
  showMode();
  say("");
}

const isChat = () => $("mode").value === "chat";

function showMode() {
  $("prompt-label").textContent = isChat() ? "Message" : "Text to continue";
  $("system-box").hidden = !isChat();
}

function showPolicy() {
  const entry = menu[Number($("policy").value)];
  $("policy-summary").textContent = entry ? entry.multicolm.summary : "";
  $("threshold-box").hidden = !(entry && entry.multicolm.threshold);
  $("threshold").value = "";
}

function request(prompt) {
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
  const n = Math.min(N_LIKELIEST, entry.multicolm.top_logprobs);
  if (isChat()) {
    const system = $("system").value.trim();
    body.messages = [
      ...(system ? [{ role: "system", content: system }] : []),
      ...turns.flatMap(([asked, said]) => [
        { role: "user", content: asked }, { role: "assistant", content: said },
      ]),
      { role: "user", content: prompt },
    ];
    if (n) Object.assign(body, { logprobs: true, top_logprobs: n });
  } else {
    body.prompt = prompt;
    if (n) body.logprobs = n;
  }
  return ["messages" in body ? "/v1/chat/completions" : "/v1/completions", body];
}

// The prompt and what is written after it, as one entry of the log.
function begin(prompt) {
  const node = element("li", "turn card");
  const text = element("div", "text");
  text.dir = "auto";
  text.tabIndex = 0;
  text.setAttribute("aria-label", "Answer; arrow keys walk through its tokens");
  const detail = element("dl", "detail");
  detail.setAttribute("aria-live", "polite");
  detail.hidden = true;
  node.append(element("p", "asked", prompt), text, detail, element("p", "usage"));
  const own = new Answer(node);
  text.addEventListener("keydown", (event) => walk(own, event));
  text.addEventListener("focus", () => { if (own.picked < 0 && own.spans.length) pick(own, 0); });
  $("log").append(node);
  return own;
}

async function write() {
  const prompt = $("prompt").value;
  if (running || !menu.length || !prompt) return;
  const [address, body] = request(prompt);
  answer = begin(prompt);
  $("prompt").value = "";
  running = new AbortController();
  busy(true);
  say("Writing…");
  const start = performance.now();
  try {
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
  if (!answer.node.isConnected) return;  // of a chat that is over
  if (!answer.characters.length && !answer.tokens.length) {  // to be asked once more
    answer.node.remove();
    $("prompt").value ||= prompt;
  } else if ("messages" in body) {
    turns.push([prompt, answer.characters.join("")]);
  }
}

function clear() {
  if (running) running.abort();
  turns = [];
  $("log").replaceChildren();
  say("");
  $("prompt").focus();
}

function busy(is) {
  $("go").disabled = is;
  $("stop").disabled = !is;
  $("log").setAttribute("aria-busy", String(is));
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
    for (const piece of added.pieces) answer.characters.push(...piece.text);
    answer.tokens.push(...added.tokens);
    show(answer);
    if (choice.finish_reason) say(ending(added.finish_reason));
  }
  if (event.usage) showUsage(event, (performance.now() - start) / 1000);
}

const ENDINGS = {
  eos: "Finished.", stop: "Stopped at a stop text.",
  length: "Stopped at the limit of new tokens.", context: "A model's context is full.",
};
const ending = (reason) => ENDINGS[reason] || reason;

// A token's characters end where the next token begins; those that are not certain yet are not here.
function show(own) {
  const { characters, tokens, spans } = own;
  while (spans.length < tokens.length) {
    const i = spans.length;
    const span = element("span", `token ${writerClass(tokens[i].model)}`);
    span.addEventListener("mouseenter", () => pick(own, i));
    spans.push(span);
    own.part("text").append(span);
  }
  for (let i = own.whole; i < spans.length; i += 1) {
    const isLast = i + 1 === tokens.length;
    const end = isLast ? characters.length : tokens[i + 1].offset;
    spans[i].textContent = characters.slice(tokens[i].offset, end).join("");
    if (!isLast && end <= characters.length && i === own.whole) own.whole += 1;
  }
}

function pick(own, i) {
  if (own.picked >= 0) own.spans[own.picked].classList.remove("picked");
  own.picked = i;
  own.spans[i].classList.add("picked");
  const token = own.tokens[i];
  const facts = [["token", JSON.stringify(token.text)], ["written by", token.model]];
  if (token.logprob !== null) {
    facts.push(["probability", percent(token.logprob)]);
    facts.push(["log-probability", `${(token.logprob > -0.0005 ? 0 : token.logprob).toFixed(3)} nats`]);
  }
  if (token.score !== null) facts.push(["policy's score", token.score.toPrecision(4)]);
  own.part("detail").hidden = false;
  own.part("detail").replaceChildren(...facts.map(([name, value]) => {
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

function walk(own, event) {
  const { picked, spans } = own;
  const steps = { ArrowRight: picked + 1, ArrowLeft: picked - 1, Home: 0, End: spans.length - 1 };
  if (!(event.key in steps) || !spans.length) return;
  event.preventDefault();
  pick(own, Math.min(spans.length - 1, Math.max(0, steps[event.key])));
  spans[own.picked].scrollIntoView({ block: "nearest" });
}

const count = (n, noun, nouns) => `${n} ${n === 1 ? noun : nouns}`;

function showUsage(event, seconds) {
  const used = event.multicolm.usage;
  const n = event.usage.completion_tokens;
  const parts = Object.entries(used).map(([name, u]) =>
    `${name} wrote ${u.tokens_written} and read ${count(u.tokens_read, "token", "tokens")} ` +
    `in ${count(u.forwards, "pass", "passes")}`);
  const mixed = n - Object.values(used).reduce((sum, u) => sum + u.tokens_written, 0);
  if (mixed) parts.push(`${count(mixed, "was", "were")} written together`);
  answer.part("usage").textContent = `${count(n, "token", "tokens")} in ${seconds.toFixed(2)} s · ${parts.join(" · ")}`;
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); write(); });
$("stop").addEventListener("click", () => running && running.abort());
$("policy").addEventListener("change", showPolicy);
$("key").addEventListener("change", loadMenu);
$("mode").addEventListener("change", showMode);
$("new").addEventListener("click", clear);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
loadMenu();
