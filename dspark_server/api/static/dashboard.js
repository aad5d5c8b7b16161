// State, the feed, and the controls. The feed is read with fetch, not EventSource, which cannot send a key.

import { drawAcceptance, drawHistory, drawParts, drawScheduler } from "./charts.js";
import { OwnView, drawBatch } from "./views.js";

const $ = (id) => document.getElementById(id);
const WINDOW = 2; // seconds that rates are taken over
const MEMORY = 20; // seconds that acceptance is taken over
const FAST = 0.4; // of the profile's time, below which the profile is too slow to be believed
const HISTORY = 60; // seconds of the budget's history

let hello = null;
let feedId = null;
let state = null;
let first = null; // counters when the page was opened
let samples = []; // states of the last seconds, the newest last
let history = [];
let domain = "math";
let ownNumber = 0; // the newest prompt of this page; the server numbers them upwards
let noticeUntil = 0; // an error stays in sight until then
let dragging = false;
const own = new OwnView($("answer"), $("blocks"), $("blocks-empty"));

// -- the server --------------------------------------------------------------------------------------------------------

function headers(more = {}) {
  const key = sessionStorage.getItem("dspark-key");
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function check(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refused(response.status, body?.error?.message ?? `The server answered ${response.status}.`);
}

async function post(name, body) {
  try {
    const options = { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body) };
    return await (await check(await fetch(`/dashboard/${name}`, options))).json();
  } catch (error) {
    noticeUntil = Date.now() + 6000;
    status("bad", error.message);
    return null;
  }
}

async function readFeed() {
  const response = await check(await fetch("/dashboard/feed", { headers: headers(), cache: "no-store" }));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      const [, name, data] = /^event: (\w+)\ndata: (.*)$/s.exec(event);
      if (name === "hello") onHello(JSON.parse(data));
      else onState(JSON.parse(data));
    }
  }
}

async function watch() {
  for (;;) {
    let message = "The connection ended; trying again.";
    try {
      await readFeed();
    } catch (error) {
      if (error.status === 401) {
        status("bad", "needs a key");
        $("key-form").hidden = false;
        $("key").focus();
        return;
      }
      message = error.status ? error.message : "The server cannot be reached; trying again.";
    }
    status("bad", message);
    enable(false);
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

function status(kind, text) {
  if ($("status").textContent === text) return;
  $("status").dataset.state = kind;
  $("status").textContent = text;
}

// -- what the feed says ------------------------------------------------------------------------------------------------

function onHello(message) {
  hello = message;
  feedId = message.feed;
  samples = [];
  ownNumber = 0;
  setBusy(false);
  $("key-form").hidden = true;
  $("model").textContent = `${hello.model} · ${hello.backend}`;
  $("version").textContent = hello.version;
  $("load").max = hello.max_num_seqs;
  options($("policy"), hello.policies);
  options($("drafter"), hello.drafters);
  buildDomains();
  enable(true);
  status("live", "live");
}

function onState(message) {
  state = message;
  if (!first || message.counters.steps < first.steps) first = message.counters; // opened, or the server began anew
  samples.push(message);
  while (samples.length > 2 && message.at - samples[1].at > MEMORY) samples.shift();
  if (message.own) onOwn(message.own);
  if (Date.now() > noticeUntil) status(message.health === "ready" ? "live" : "bad", message.health === "ready" ? "live" : message.health);
  warn(message);
  if (!dragging) setLoad(message.load.requests);
  if (document.activeElement !== $("policy")) $("policy").value = message.policy;
  if (document.activeElement !== $("drafter")) $("drafter").value = message.drafter;
  $("policy").disabled = message.drafter === "none" || hello.policies.length < 2;
  if (!drawing) requestAnimationFrame(draw); // a hidden page draws nothing, and once when it is seen again
  drawing = true;
}

/** Steps that take far longer, or far shorter, than the cost profile says. */
function warn({ slow, slowdown }) {
  const fast = slowdown > 0 && slowdown < FAST;
  $("warning").hidden = !slow && !fast;
  if ($("warning").hidden) return;
  const times = (value) => value.toFixed(value < 10 ? 1 : 0);
  $("warning-title").textContent = slow
    ? `Steps take ${times(slowdown)} times what the cost profile says.`
    : `Steps are ${times(1 / slowdown)} times faster than the cost profile says.`;
  $("warning-advice").textContent = slow
    ? "The machine is busy with something else, or a CPU limit holds the server back. Look for other processes (top), for " +
      "the CPU limit of the container, and for other virtual machines on the host. If it stays so, restart with " +
      "--measure-costs-again."
    : "The profile was measured when the machine was slow. Serving corrects it; --measure-costs-again measures it anew at " +
      "the next start.";
}

function onOwn(message) {
  if (message.number < ownNumber) return;
  if (message.number > ownNumber) {
    ownNumber = message.number;
    own.clear();
  }
  own.show(message);
  const seconds = message.seconds;
  const rate = seconds > 0 ? `, ${(message.tokens / seconds).toFixed(0)} tok/s` : "";
  const end = { stop: "", length: ", cut at its length", abort: ", stopped", error: `, failed: ${message.error}` };
  $("speed").textContent = message.tokens ? `${message.tokens} tokens${rate}${end[message.finish_reason] ?? ""}` : "";
  if (message.finish_reason) setBusy(false);
}

/** Differences over the last `seconds`; null when nothing ran. */
function over(seconds) {
  const last = samples.at(-1);
  const from = samples.find((sample) => last.at - sample.at <= seconds) ?? samples[0];
  const begin = samples[Math.max(0, samples.indexOf(from) - 1)];
  const elapsed = last.at - begin.at;
  if (elapsed <= 0) return null;
  const [a, b] = [begin.counters, last.counters];
  let users = 0; // request-seconds
  for (let i = samples.indexOf(begin) + 1; i < samples.length; i++)
    users += samples[i].running * (samples[i].at - samples[i - 1].at);
  const budgets = b.budgets.map((count, i) => count - a.budgets[i]);
  const able = budgets.reduce((sum, count) => sum + count, 0);
  return {
    elapsed,
    users,
    generated: b.generation_tokens - a.generation_tokens,
    accepted: b.accepted_tokens - a.accepted_tokens,
    able,
    steps: b.steps - a.steps,
    seconds: Object.fromEntries(Object.entries(b.seconds).map(([part, value]) => [part, value - a.seconds[part]])),
    budget: able ? budgets.reduce((sum, count, i) => sum + i * count, 0) / able : null,
    // Verified at position k: every request whose budget 1 + l has l > k.
    verified: a.accepted_per_position.map((_, k) => budgets.slice(k + 2).reduce((sum, count) => sum + count, 0)),
    accepted_at: b.accepted_per_position.map((count, k) => count - a.accepted_per_position[k]),
  };
}

// -- drawing -----------------------------------------------------------------------------------------------------------

let acceptance = [];
let parts = { draft: 0, verify: 0, host: 0 }; // milliseconds of a step

let drawing = false;

function draw() {
  drawing = false;
  const now = over(WINDOW);
  const active = state.running > 0;
  const number = (value, digits) => (value === null || !Number.isFinite(value) ? "–" : value.toFixed(digits));
  $("running").textContent = state.running;
  $("waiting").textContent = state.waiting ? `+ ${state.waiting} waiting` : "none waiting";
  $("gain").textContent = number(state.gain, 2);
  $("kv").textContent = (100 * state.kv_usage).toFixed(1);
  if (now) {
    $("total").textContent = active || now.generated ? number(now.generated / now.elapsed, 0) : "–";
    $("each").textContent = active && now.users ? number(now.generated / now.users, 1) : "–";
    $("tau").textContent = now.able ? number(1 + now.accepted / now.able, 2) : "–";
    $("budget").textContent = number(now.budget, 2);
    remember(now);
    if (now.steps)
      parts = Object.fromEntries(Object.entries(now.seconds).map(([part, s]) => [part, (1000 * s) / now.steps]));
  }
  drawParts($("parts"), parts);
  const longer = over(MEMORY);
  if (longer?.verified[0] || !acceptance.length)
    acceptance = (longer?.verified ?? []).map((verified, k) => [longer.accepted_at[k], verified]);
  drawAcceptance($("acceptance"), acceptance);
  drawScheduler($("sps"), state.costs, state.picture);
  describe(state.picture);
  drawHistory($("history"), history, HISTORY);
  drawBatch($("batch"), $("batch-note"), state.picture);
  drawCounters();
}

function remember(now) {
  const last = history.at(-1);
  if (last && state.at - last.at < 0.5) return;
  history.push({ at: state.at, running: state.running, budget: state.running ? now.budget : null });
  while (state.at - history[0].at > HISTORY) history.shift();
}

function describe(picture) {
  if (!picture) return;
  const { tokens, sampling, drafting, drafts, prefill, policy } = picture;
  const each = drafting ? `${drafting} drafted, ${drafts} of their tokens verified` : "no request drafted";
  const prompts = prefill ? `, ${prefill} prompt tokens beside them` : "";
  $("sps-note").textContent =
    `Policy ${policy}: ${sampling} request${sampling === 1 ? "" : "s"} (grey), ${each}${prompts}: B = ${tokens}. ` +
    "Θ = expected tokens × steps per second; causal stops where Θ no longer rises.";
}

const COUNTERS = [
  ["steps", "steps"],
  ["prompt_tokens", "prompt tokens"],
  ["generation_tokens", "tokens generated"],
  ["drafts", "blocks verified"],
  ["draft_tokens", "draft tokens verified"],
  ["accepted_tokens", "draft tokens accepted"],
  ["skipped", "steps of a request without a draft"],
];

function drawCounters() {
  if (!$("counters").children.length)
    for (const [name, words] of COUNTERS) {
      const item = document.createElement("div");
      const value = document.createElement("dd");
      value.id = `counter-${name}`;
      item.append(Object.assign(document.createElement("dt"), { textContent: words }), value);
      $("counters").append(item);
    }
  for (const [name] of COUNTERS)
    $(`counter-${name}`).textContent = (state.counters[name] - first[name]).toLocaleString("en");
}

// -- words -------------------------------------------------------------------------------------------------------------

/** Each term opens its explanation beside it, and shows it to a mouse that rests on it. */
function explainWords() {
  for (const button of document.querySelectorAll("[popovertarget]")) {
    const word = $(button.getAttribute("popovertarget"));
    button.title = word.textContent.replace(/\s+/g, " ").trim();
    button.addEventListener("click", () => {
      const [place, size] = [button.getBoundingClientRect(), word.getBoundingClientRect()];
      word.style.left = `${Math.max(8, Math.min(place.left, innerWidth - size.width - 8))}px`;
      const below = place.bottom + 6;
      word.style.top = `${below + size.height < innerHeight ? below : Math.max(8, place.top - size.height - 6)}px`;
    });
  }
}

// -- controls ----------------------------------------------------------------------------------------------------------

function options(select, values) {
  select.replaceChildren(...values.map((value) => new Option(value, value)));
}

function buildDomains() {
  if ($("domains").querySelector("input")) return;
  for (const name of Object.keys(hello.prompts)) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "domain", value: name });
    input.checked = name === domain;
    input.addEventListener("change", () => pickDomain(name));
    label.append(input, Object.assign(document.createElement("span"), { textContent: name }));
    $("domains").append(label);
  }
  showSamples();
  if (!$("prompt").value) $("prompt").value = hello.prompts[domain][0];
}

function pickDomain(name) {
  domain = name;
  showSamples();
  $("prompt").value = hello.prompts[name][0];
  if (state?.load.requests) sendLoad();
}

function showSamples() {
  const items = hello.prompts[domain].map((text) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text, title: text });
    button.addEventListener("click", () => {
      $("prompt").value = text;
      $("prompt").focus();
    });
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
  $("samples").replaceChildren(...items);
}

function enable(on) {
  for (const id of ["load", "policy", "drafter", "run"]) $(id).disabled = !on;
}

function setBusy(on) {
  $("stop").disabled = !on;
}

function setLoad(value) {
  $("load").value = value;
  $("load-value").textContent = value;
}

let loadTimer = 0;

function sendLoad() {
  clearTimeout(loadTimer);
  loadTimer = setTimeout(async () => {
    await post("load", { requests: Number($("load").value), domain });
    dragging = false;
  }, 150);
}

$("load").addEventListener("input", () => {
  dragging = true;
  $("load-value").textContent = $("load").value;
  sendLoad();
});
$("policy").addEventListener("change", () => post("policy", { policy: $("policy").value }));
$("drafter").addEventListener("change", () => post("policy", { drafter: $("drafter").value }));

async function run() {
  const prompt = $("prompt").value.trim();
  if (!prompt || $("run").disabled) return;
  own.clear();
  $("speed").textContent = "";
  setBusy(true);
  const body = { feed: feedId, prompt, max_tokens: Number($("length").value), temperature: Number($("temperature").value) };
  if ((await post("prompt", body)) === null) setBusy(false);
}

$("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  }
});
$("stop").addEventListener("click", () => post("stop", { feed: feedId }));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("dspark-key", $("key").value);
  $("key").value = "";
  $("key-form").hidden = true;
  status("wait", "connecting");
  watch();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => state && draw());
addEventListener("resize", () => state && draw());

$("base-url").textContent = `${location.origin}/v1`;
explainWords();
watch();
