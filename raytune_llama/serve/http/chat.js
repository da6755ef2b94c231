"use strict";
const at = (id) => document.getElementById(id);
const [log, text, model, key, system, problem] =
  ["log", "text", "model", "key", "system", "problem"].map(at);
// Relative to the page, whatever prefix it is served under.
const API = location.pathname.replace(/\/?$/, "/") + "v1/";
const JSON_NUMBER = /^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/;

/** An error whose message is shown to the user. */
class Problem extends Error {}

/** The conversation: {role, text, model, note, isBad}, in order. */
let turns = [];
/** AbortController of the response in progress, or null. */
let running = null;
/** Whether a frame that draws the response is scheduled. */
let isDrawing = false;
/** Number of the latest model list request; responses to older ones are dropped. */
let newestList = 0;

// ---- The endpoint ----

/** Send a request to the endpoint; `body` is JSON, or undefined for GET. */
async function ask(path, body, signal) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  const secret = key.value.trim();
  if (!/^[\x21-\x7e]*$/.test(secret)) {
    throw new Problem("The API key contains a space or a non-ASCII character; copy it again.");
  }
  if (secret) headers.Authorization = `Bearer ${secret}`;
  const method = body === undefined ? "GET" : "POST";
  let response;
  try {
    response = await fetch(API + path, { method, headers, body, signal, cache: "no-store" });
  } catch (error) {
    throw new Problem(`The endpoint can't be reached: ${error.message}`);
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

/** Return the Problem of an error response: OpenAI's error body, or whatever text it has. */
async function problemOf(response) {
  const body = await response.text().catch(() => "");
  let message = body.trim().slice(0, 300) || response.statusText || "no reason given";
  try {
    message = String(JSON.parse(body).error.message);
  } catch { /* Not in OpenAI's format, for example from a proxy: shown as received. */ }
  if (response.status === 401) {
    openSettings(true);
    key.focus();
    const what = key.value ? "rejected this API key" : "requires an API key";
    return new Problem(`The endpoint ${what}: enter one under Settings. (401: ${message})`);
  }
  const wait = response.headers.get("Retry-After");
  const when = /^\d+$/.test(wait ?? "") ? `in ${wait} s` : `after ${wait}`;
  const what = response.status === 429 ? "Too many requests" : "Request failed";
  return new Problem(`${what} (${response.status}): ${message}${wait ? `\nTry again ${when}.` : ""}`);
}

/** Yield the data of a response's server-sent events. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

/** Fill the list of models. */
async function loadModels() {
  const number = ++newestList;
  try {
    const list = await (await ask("models")).json();
    if (number !== newestList) return;
    const chosen = model.value;
    model.replaceChildren(...list.data.map((card) => new Option(card.id, card.id)));
    if (list.data.some((card) => card.id === chosen)) model.value = chosen;
    showProblem("");
  } catch (error) {
    if (number === newestList) showProblem(error.message);
  }
  at("title").textContent = model.value || "Chat";
}

/** Body of the next request. Numbers are sent as typed: a seed may have 64 bits. */
function requestBody() {
  if (!model.value) throw new Problem("No model is available.");
  const messages = turns.map((turn) => ({ role: turn.role, content: turn.text }));
  if (system.value.trim()) messages.unshift({ role: "system", content: system.value });
  const asked = { model: model.value, messages, stream: true };
  asked.stream_options = { include_usage: true };
  let fields = JSON.stringify(asked).slice(1, -1);
  for (const input of document.querySelectorAll("[data-field]")) {
    const value = input.value.trim();
    if (value && !JSON_NUMBER.test(value)) {
      throw new Problem(`${input.dataset.field}: ${value} is not a number; enter for example 0.7 or 40.`);
    }
    if (value) fields += `,"${input.dataset.field}":${value}`;
  }
  return `{${fields}}`;
}

/**
 * Request the model's response to the conversation.
 * If none arrives, restore the conversation `before`, and the question in the composer.
 */
async function answer(before, question) {
  const mine = (running = new AbortController());
  const turn = { role: "assistant", text: "", model: model.value, note: "", isBad: false };
  showProblem("");
  try {
    const body = requestBody();
    turns.push(turn);
    render();
    log.scrollTop = log.scrollHeight;
    const began = performance.now();
    turn.note = await receive(await ask("chat/completions", body, mine.signal), turn, began);
  } catch (error) {
    if (running !== mine) return; // The conversation was cleared.
    const isStopped = mine.signal.aborted;
    const message = error instanceof Problem ? error.message : `Connection lost: ${error.message}`;
    if (turn.text) {
      turn.note = isStopped ? "Stopped." : `Interrupted. ${message}`;
      turn.isBad = !isStopped;
    } else {
      turns = before;
      if (question && !text.value) text.value = question;
      showProblem(isStopped ? "" : message);
    }
  }
  if (running !== mine) return;
  running = null;
  render();
}

/** Add a streamed response to a turn as it arrives; return the note below it. */
async function receive(response, turn, began) {
  let first = 0, last = 0, usage = null, finish = "";
  for await (const data of eventsOf(response)) {
    if (data === "[DONE]") return noteOf(usage, finish, began, first, last);
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Problem(chunk.error.message);
    usage = chunk.usage ?? usage;
    const choice = chunk.choices[0];
    finish = choice?.finish_reason ?? finish;
    if (choice?.delta.content) {
      last = performance.now();
      first ||= last;
      add(turn, choice.delta.content);
    }
  }
  throw new Problem("The connection was closed before the response was complete.");
}

/** Return the note of a response: token counts, throughput, time to first token. */
function noteOf(usage, finish, began, first, last) {
  const facts = [];
  if (finish === "length") facts.push("truncated at the token limit");
  if (usage) facts.push(`tokens: ${usage.prompt_tokens} prompt, ${usage.completion_tokens} completion`);
  if (usage?.completion_tokens > 1 && last > first) {
    const rate = (usage.completion_tokens - 1) / ((last - first) / 1000);
    facts.push(`${rate.toPrecision(3)} tokens/s`);
  }
  if (first) facts.push(`first token after ${((first - began) / 1000).toFixed(2)} s`);
  return facts.join(" \u00b7 ");
}

// ---- Rendering; text of any origin is only ever inserted as text ----

function element(name, className, content) {
  const made = document.createElement(name);
  made.className = className;
  made.append(content);
  return made;
}

function button(name, act) {
  const made = element("button", "", name);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

function showProblem(message) {
  problem.textContent = message;
  problem.hidden = !message;
}

/** Append text to the response in progress; it is drawn at most once per frame. */
function add(turn, delta) {
  turn.text += delta;
  if (!isDrawing) requestAnimationFrame(draw);
  isDrawing = true;
}

/** Show the text so far, and scroll with it unless the user has scrolled up. */
function draw() {
  isDrawing = false;
  const shown = log.querySelector(".coming .text");
  if (!shown) return;
  const isFollowed = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  shown.textContent = turns.at(-1).text;
  if (isFollowed) log.scrollTop = log.scrollHeight;
}

function render() {
  document.body.classList.toggle("running", running !== null);
  at("send").textContent = running ? "Stop" : "Send";
  log.setAttribute("aria-busy", String(running !== null));
  const isFollowed = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  if (turns.length) log.replaceChildren(...turns.map(show));
  if (isFollowed) log.scrollTop = log.scrollHeight;
  if (turns.length) return;
  const empty = element("div", "", element("strong", "", "What would you like to ask?"));
  empty.id = "empty";
  empty.append("Responses are generated by a model and may be wrong.");
  log.replaceChildren(empty);
}

function show(turn, index) {
  const isLast = index === turns.length - 1, isAnswer = turn.role === "assistant";
  const made = element("article", `turn ${turn.role}`, "");
  made.classList.toggle("coming", isLast && running !== null);
  made.append(element("div", "who", isAnswer ? turn.model : "You"));
  const shown = element("div", "text", turn.text);
  shown.dir = "auto";
  made.append(shown);
  const note = turn.note || (isAnswer && !turn.text && !running ? "Empty response." : "");
  const foot = element("div", "foot", note ? element("span", turn.isBad ? "bad" : "", note) : "");
  foot.append(button("Edit", () => edit(made, index)));
  if (isLast && isAnswer) foot.append(button("Regenerate", regenerate));
  made.append(foot);
  return made;
}

/** Edit a turn in place: a response is replaced, a question is sent again from there. */
function edit(made, index) {
  const { role, text: old } = turns[index];
  const form = element("form", "edit", ""), field = element("textarea", "", "");
  field.value = old;
  field.setAttribute("aria-label", "Edited message");
  const done = element("button", "", role === "user" ? "Send again" : "Save");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running || !field.value.trim()) return;
    const before = turns, changed = { ...turns[index], text: field.value };
    if (role === "assistant") {
      turns = turns.with(index, { ...changed, note: "Edited." });
      return render();
    }
    turns = [...turns.slice(0, index), changed];
    answer(before, field.value);
  });
  field.addEventListener("keydown", (event) => onEnter(event, () => form.requestSubmit()));
  form.append(field, button("Cancel", render), done);
  made.replaceChildren(form);
  field.focus();
}

// ---- User actions ----

/** Act on Enter, but not with Shift or while an input method composes. */
function onEnter(event, act) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  act();
}

function send() {
  const question = text.value;
  if (running || !question.trim()) return;
  const before = turns;
  turns = [...turns, { role: "user", text: question }];
  text.value = "";
  answer(before, question);
}

function regenerate() {
  if (running) return;
  const before = turns;
  turns = turns.slice(0, -1);
  answer(before, "");
}

function clear() {
  running?.abort();
  running = null;
  turns = [];
  showProblem("");
  render();
  text.focus();
}

function openSettings(isOpen) {
  document.body.classList.toggle("open", isOpen);
  at("menu").setAttribute("aria-expanded", String(isOpen));
}

/** Get or set the API key in sessionStorage; empty if the browser forbids it. */
function remembered(value) {
  try {
    if (value !== undefined) sessionStorage.setItem("key", value);
    return sessionStorage.getItem("key") ?? "";
  } catch { return ""; }
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else send();
});
text.addEventListener("keydown", (event) => onEnter(event, send));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  openSettings(false);
});
at("clear").addEventListener("click", clear);
at("menu").addEventListener("click", () => openSettings(!document.body.classList.contains("open")));
at("close").addEventListener("click", () => openSettings(false));
model.addEventListener("change", () => { at("title").textContent = model.value; });
key.addEventListener("input", () => remembered(key.value));
key.addEventListener("change", loadModels);

key.value = remembered();
render();
loadModels();
