"use strict";
const at = (id) => document.getElementById(id);
const [log, text, model, key, system, problem] =
  ["log", "text", "model", "key", "system", "problem"].map(at);
// Beside the page, whatever the prefix that it is served under.
const API = location.pathname.replace(/\/?$/, "/") + "v1/";
const JSON_NUMBER = /^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/;

/** What is shown to the user as it stands. */
class Problem extends Error {}

/** The conversation: {role, text, model, note, isBad}, in order. */
let turns = [];
/** The AbortController of the answer that is coming, or null. */
let running = null;
/** Whether the next frame draws the answer. */
let isDrawing = false;
/** Number of the newest request for the list of models; answers to older ones are dropped. */
let newestList = 0;

// ---- The endpoint ----

/** Ask the endpoint; `body` is JSON, or undefined for GET. */
async function ask(path, body, signal) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  const secret = key.value.trim();
  if (!/^[\x21-\x7e]*$/.test(secret)) {
    throw new Problem("The key has a space or a sign beyond ASCII; copy it again.");
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

/** Put a refusal in words: OpenAI's error body, or what else there is. */
async function problemOf(response) {
  const body = await response.text().catch(() => "");
  let said = body.trim().slice(0, 300) || response.statusText || "no reason given";
  try {
    said = String(JSON.parse(body).error.message);
  } catch { /* Not OpenAI's form, as from a proxy in between: shown as it came. */ }
  if (response.status === 401) {
    openSettings(true);
    key.focus();
    const what = key.value ? "does not take this key" : "asks for a key";
    return new Problem(`The endpoint ${what}: enter one under Settings. (401: ${said})`);
  }
  const wait = response.headers.get("Retry-After");
  const when = /^\d+$/.test(wait ?? "") ? `in ${wait} s` : `after ${wait}`;
  const what = response.status === 429 ? "The endpoint is busy" : "The endpoint refused";
  return new Problem(`${what} (${response.status}): ${said}${wait ? `\nTry again ${when}.` : ""}`);
}

/** Yield the data of a stream's server-sent events. */
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
    tell("");
  } catch (error) {
    if (number === newestList) tell(error.message);
  }
  at("title").textContent = model.value || "Chat";
}

/** The request for the next answer. Numbers go as they are typed: a seed may have 64 bits. */
function requestBody() {
  if (!model.value) throw new Problem("There is no model to ask.");
  const messages = turns.map((turn) => ({ role: turn.role, content: turn.text }));
  if (system.value.trim()) messages.unshift({ role: "system", content: system.value });
  const asked = { model: model.value, messages, stream: true };
  asked.stream_options = { include_usage: true };
  let fields = JSON.stringify(asked).slice(1, -1);
  for (const input of document.querySelectorAll("[data-field]")) {
    const value = input.value.trim();
    if (value && !JSON_NUMBER.test(value)) {
      throw new Problem(`${input.dataset.field}: ${value} is no number; write it like 0.7 or 40.`);
    }
    if (value) fields += `,"${input.dataset.field}":${value}`;
  }
  return `{${fields}}`;
}

/**
 * Let the model answer the conversation.
 * Where nothing comes, the conversation is as `before`, and the question is in the composer again.
 */
async function answer(before, question) {
  const mine = (running = new AbortController());
  const turn = { role: "assistant", text: "", model: model.value, note: "", isBad: false };
  tell("");
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
    const said = error instanceof Problem ? error.message : `The connection broke: ${error.message}`;
    if (turn.text) {
      turn.note = isStopped ? "Stopped." : `Broken off. ${said}`;
      turn.isBad = !isStopped;
    } else {
      turns = before;
      if (question && !text.value) text.value = question;
      tell(isStopped ? "" : said);
    }
  }
  if (running !== mine) return;
  running = null;
  render();
}

/** Take an answer in as it comes; return what is to be noted about it. */
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
  throw new Problem("The connection broke before the answer was whole.");
}

/** Say how an answer came: counts, speed, wait. */
function noteOf(usage, finish, began, first, last) {
  const facts = [];
  if (finish === "length") facts.push("cut off at the limit of tokens");
  if (usage) facts.push(`tokens: ${usage.prompt_tokens} read, ${usage.completion_tokens} written`);
  if (usage?.completion_tokens > 1 && last > first) {
    const rate = (usage.completion_tokens - 1) / ((last - first) / 1000);
    facts.push(`${rate.toPrecision(3)} tokens/s`);
  }
  if (first) facts.push(`first after ${((first - began) / 1000).toFixed(2)} s`);
  return facts.join(" \u00b7 ");
}

// ---- What is seen; text from anywhere is only ever put in as text ----

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

function tell(message) {
  problem.textContent = message;
  problem.hidden = !message;
}

/** Add a piece to the answer that is coming; however many come, each frame is drawn once. */
function add(turn, piece) {
  turn.text += piece;
  if (!isDrawing) requestAnimationFrame(draw);
  isDrawing = true;
}

/** Show what has come, and follow it unless the reader has scrolled up. */
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
  empty.append("Answers are a model's and may be wrong.");
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
  const note = turn.note || (isAnswer && !turn.text && !running ? "An empty answer." : "");
  const foot = element("div", "foot", note ? element("span", turn.isBad ? "bad" : "", note) : "");
  foot.append(button("Edit", () => edit(made, index)));
  if (isLast && isAnswer) foot.append(button("Regenerate", regenerate));
  made.append(foot);
  return made;
}

/** Edit a turn in its place: an answer is replaced, a question is asked again from there. */
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

// ---- What the user does ----

/** Act on Enter, but neither with Shift nor while an input method composes. */
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
  tell("");
  render();
  text.focus();
}

function openSettings(isOpen) {
  document.body.classList.toggle("open", isOpen);
  at("menu").setAttribute("aria-expanded", String(isOpen));
}

/** sessionStorage, or nothing where the browser forbids it. */
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
