// The page to judge on. Texts of models, names and comments only ever become text nodes.
"use strict";

const $ = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 700px)");
const LETTERS = ["A", "B", "C", "D"];
const RATINGS = ["very bad", "bad", "middling", "good", "very good"];

let state = null;      // what the server said last
let before = null;     // the answer that was undone, if this item had one
let busy = false;      // an answer is on its way
let started = 0;       // when this item was last looked at, ms
let spent = 0;         // seconds before that

// -- what may be answered ------------------------------------------------------------------------

function sides() {
  return narrow.matches ? ["Upper", "Lower"] : ["Left", "Right"];
}

function names(count) {
  return count === 2 && state.question === "pair" ? sides() : LETTERS.slice(0, count);
}

function ofTwo() { return state.item.responses.length === 2 && state.question === "best"; }

function choices() {
  const count = state.item.responses.length;
  const word = (answer, label, key, ...keys) => ({answer, label, keys: [key, ...keys]});
  switch (state.question) {
    case "pair": return [
      word(0, `${sides()[0]} is better`, "1", "ArrowLeft"),
      word(1, `${sides()[1]} is better`, "2", "ArrowRight"),
      word("tie", "Tie", "3"), word("both_bad", "Both bad", "4")];
    case "thumbs": return [word(false, "👎 Bad", "1", "ArrowLeft"), word(true, "👍 Good", "2", "ArrowRight")];
    case "rating": return RATINGS.map((text, i) => word(i + 1, text, String(i + 1)));
    default: return [...names(count).map((name, i) =>
        word(i, `${name} is ${ofTwo() ? "better" : "best"}`, String(i + 1))),
      word("both_bad", ofTwo() ? "Both bad" : "All bad", "5")];
  }
}

const QUESTION = {
  pair: "Which response is better?", thumbs: "Is the response good?",
  rating: "How good is the response?", best: "Which response is best?",
};
const SIGNS = {ArrowLeft: "←", ArrowRight: "→"};

// -- what is kept in this browser ----------------------------------------------------------------

function keep(name, value) {
  const key = `trl ${state.store} ${state.name} ${name}`;
  try {
    if (value === undefined) return JSON.parse(localStorage.getItem(key));
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, JSON.stringify(value));
  } catch { /* a browser that keeps nothing: the page works without drafts */ }
  return null;
}

function seconds() {
  return spent + (started ? (performance.now() - started) / 1000 : 0);
}

function keepDraft() {
  if (!state || !state.item || busy) return;
  keep(`draft ${state.item.id}`, {comment: $("comment").value, flag: flagged(), seconds: seconds()});
}

// -- texts ---------------------------------------------------------------------------------------

function element(name, text, more = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(more)) made.setAttribute(key, value);
  return made;
}

// A text of unknown origin; what stands between lines of ``` is shown as code, to its letter, below
// the name of its language. Of text and name, every other one is a name.
function textBlock(text, label) {
  const block = element("div", undefined, {class: "text"});
  const parts = text.split(/^[ \t]*```([^`\n]*)(?:\n|$)/m);
  parts.forEach((part, index) => {
    if (index % 2) return;
    if (index % 4) {
      const language = parts[index - 1].trim();
      if (language) block.append(element("div", language, {class: "role"}));
      const pre = element("pre", undefined, {dir: "ltr", tabindex: "0", "aria-label": "Code"});
      pre.append(element("code", part));
      block.append(pre);
    } else if (part.trim() || text === part) {
      block.append(element("div", part.replace(/^\n+|\n+$/g, ""), {dir: "auto", class: "prose"}));
    }
  });
  if (!text.trim()) block.replaceChildren(element("em", "(empty)"));
  if (text.length > 1500) {  // scrolls on its own, so that the others stay in sight
    const more = {tabindex: "0", role: "region", "aria-label": `${label}, scrolls`, class: "text long"};
    for (const [key, value] of Object.entries(more)) block.setAttribute(key, value);
  }
  return block;
}

function showPrompt(prompt) {
  const box = $("prompt");
  box.replaceChildren(element("h3", "Prompt"));
  if (typeof prompt === "string") return box.append(textBlock(prompt, "Prompt"));
  for (const message of prompt) {
    const said = element("div", undefined, {class: "message"});
    said.append(element("span", message.role, {class: "role", dir: "auto"}), textBlock(message.content, "Message"));
    box.append(said);
  }
}

function showItem() {
  const item = state.item;
  for (const [id, there] of [["item", item], ["bar", true], ["done", !item], ["progress", true], ["show-history", true]])
    $(id).hidden = !there;
  $("answers").hidden = $("comment-label").hidden = $("flag").hidden = $("skip").hidden = !item;
  $("name").textContent = state.name;
  $("guidelines").hidden = !$("guidelines-text").textContent.trim();
  $("join").hidden = true;
  showProgress();
  $("question").textContent = item ? QUESTION[ofTwo() ? "pair" : state.question] : "";
  if (!item) return $("done").querySelector("h2").focus();
  showPrompt(item.prompt);
  const labels = names(item.responses.length);
  $("responses").className = `n${item.responses.length}`;
  $("responses").replaceChildren(...item.responses.map((text, index) => {
    const title = item.responses.length > 1 ? labels[index] : "Response";
    const box = element("section", undefined, {class: "response", "aria-label": `${title} response`});
    if (item.responses.length === 1) box.setAttribute("aria-label", title);
    box.append(element("h3", title), textBlock(text, title));
    return box;
  }));
  showButtons();
}

function showProgress() {
  $("undo").disabled = state.last === null;
  const {own, items, votes, asked} = state.progress;
  for (const [id, value, most] of [["own", own, items], ["all", votes, asked]]) {
    $(id).max = Math.max(most, 1);
    $(id).value = value;
    $(`${id}-words`).textContent = `${value} of ${most}`;
  }
  const waiting = state.waiting;
  $("enough").hidden = $("waiting").hidden = !waiting;
  if (waiting) $("waiting").textContent = `The training waits for ${waiting.left} of ${waiting.of}`;
}

function showButtons() {
  const help = [];
  $("answers").replaceChildren(...choices().map((choice) => {
    const was = before && before.answer === choice.answer;
    const button = element("button", undefined, {type: "button", class: was ? "was" : ""});
    const keys = choice.keys.map((key) => SIGNS[key] || key);
    button.append(element("span", choice.label), ...keys.map((key) => element("kbd", key)));
    if (was) button.append(element("span", "was your answer", {class: "hint"}));
    button.addEventListener("click", () => answer(choice.answer, choice.label));
    help.push([keys, choice.label]);
    return button;
  }));
  help.push(["U", "Undo the last answer"], ["S", "Skip: not for me"], ["F", "Flag: something is wrong with it"],
    ["C", "Write a comment; Esc leaves it"], ["H", "Your answers, to undo any"], ["E", "Enough for now: a training that waits goes on without the rest"], ["G", "Guidelines"], ["?", "These keys"]);
  $("help-keys").replaceChildren(...help.map(([keys, text]) => {
    const row = element("tr");
    const head = element("th", undefined, {scope: "row"});
    head.append(...[...keys].map((key) => element("kbd", key)));
    row.append(head, element("td", text));
    return row;
  }));
}

function say(text) { $("said").textContent = text; }

function trouble(text) {
  $("trouble").hidden = !text;
  $("trouble").textContent = text || "";
}

// -- the server ----------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(status, body) { super(body.error || `The server says ${status}.`); this.status = status; }
}

async function ask(path, body) {
  const options = {headers: {}};
  if (body) {
    options.method = "POST";
    options.headers = {"Content-Type": "application/json", "X-CSRF-Token": state ? state.csrf : ""};
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  const found = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refusal(response.status, found);
  return found;
}

// Sends until there is an answer: one that says no is thrown, none at all is tried again.
async function insist(path, body) {
  for (let wait = 500; ; wait = Math.min(2 * wait, 10000)) {
    try {
      const found = await ask(path, body);
      trouble("");
      return found;
    } catch (error) {
      if (error instanceof Refusal && error.status < 500) throw error;
      trouble(error instanceof Refusal ? `${error.message} Your answer is kept here, and sent again.`
        : "The server does not answer. Your answer is kept here, and sent again.");
      await new Promise((done) => setTimeout(done, wait));
    }
  }
}

function take(found, draft) {
  state = found;
  busy = false;
  before = found.undone || null;
  const kept = draft || (state.item && keep(`draft ${state.item.id}`)) || {};
  $("comment").value = kept.comment || "";
  setFlag(kept.flag);
  spent = kept.seconds || 0;
  started = document.hidden ? 0 : performance.now();
  showItem();
}

async function load() {
  try {
    state = await insist("/api/state");
  } catch (error) {
    $("join").hidden = false;
    if (error.status !== 401) trouble(error.message);
    return;
  }
  const waiting = keep("waiting");
  if (waiting) {  // the page was closed before this was acknowledged; twice is once
    showItem();
    await send(waiting, "Your answer of before");
  } else take(state);
}

async function send(vote, label) {
  busy = true;
  keep("waiting", vote);
  try {
    const found = await insist("/api/vote", vote);
    keep("waiting", null);
    keep(`draft ${vote.item}`, null);
    take(found);
    say(`${label}: stored.`);
    if (narrow.matches) $("guidelines").open = false;  // they were read, and a phone is small
    if (state.item) focusItem();
  } catch (error) {
    keep("waiting", null);
    busy = false;
    const told = error.message;
    await refresh();
    trouble(told);
  }
}

async function refresh() {
  try { take(await insist("/api/state")); } catch (error) { location.reload(); }
}

function focusItem() {
  $("item-title").focus({preventScroll: true});
  scrollTo(0, 0);
}

function answer(value, label) {
  if (busy || !state || !state.item) return;
  const client = [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");
  trouble("");
  send({item: state.item.id, client, answer: value, seconds: Math.round(seconds() * 100) / 100,
    flag: flagged(), comment: $("comment").value}, label);
}

async function enough() {
  if (busy || !state || !state.waiting) return;
  keepDraft();
  busy = true;
  try {
    take(await insist("/api/enough", {}));
    say("Enough for now: the training goes on without the rest.");
  } catch (error) {
    busy = false;
    trouble(error.message);
  }
}

// A training asks again and again: what it asks next comes up by itself.
async function lookAgain() {
  if (busy || !state || state.item || document.hidden || document.querySelector("dialog[open]")) return;
  const found = await ask("/api/state").catch(() => null);
  if (!found || busy || state.item) return;
  if (found.item) {
    take(found);
    focusItem();
  } else {
    state = found;
    showProgress();
  }
}
setInterval(lookAgain, 1500);

async function undo(vote) {
  if (busy || !state || vote === null) return;
  keepDraft();
  busy = true;
  trouble("");
  try {
    const found = await insist("/api/undo", {vote});
    take(found, found.item && found.item.id === found.undone.item ? found.undone : undefined);
    say("Undone: answer once more.");
    if (state.item) focusItem();
  } catch (error) {
    busy = false;
    trouble(error.message);
  }
}

// -- flag, history, theme ------------------------------------------------------------------------

function flagged() { return $("flag").getAttribute("aria-pressed") === "true"; }

function setFlag(on) { $("flag").setAttribute("aria-pressed", on ? "true" : "false"); }

function toggleFlag() {
  setFlag(!flagged());
  say(flagged() ? "Flagged." : "Not flagged.");
  keepDraft();
}

function answerWords(value, responses) {
  if (value === "skip") return "Skipped";
  if (value === "tie") return "Tie";
  if (value === "both_bad") return state.question === "best" ? "All bad" : "Both bad";
  if (state.question === "pair") return sides()[value];
  if (state.question === "best") return LETTERS[value];
  if (state.question === "thumbs") return value ? "Good" : "Bad";
  return `${value}: ${RATINGS[value - 1]}`;
}

async function showHistory() {
  let found;
  try { found = await ask("/api/history"); } catch (error) { return trouble(error.message); }
  $("history-list").replaceChildren(...found.votes.map((vote) => {
    const row = element("li");
    const button = element("button", "Undo", {type: "button", "aria-label": `Undo: ${answerWords(vote.answer)}`});
    button.addEventListener("click", () => { $("history").close(); undo(vote.vote); });
    row.append(button, element("strong", ` ${answerWords(vote.answer)}${vote.flag ? " ⚑" : ""} `),
      element("span", vote.prompt, {dir: "auto", class: "snippet"}));
    if (vote.comment) row.append(element("q", vote.comment, {dir: "auto"}));
    return row;
  }));
  if (!found.votes.length) $("history-list").replaceChildren(element("li", "None yet."));
  $("history").showModal();
}

function theme(turn) {
  let chosen = null;
  try { chosen = localStorage.getItem("trl theme"); } catch { /* as the system has it */ }
  if (turn) {
    const dark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    chosen = dark ? "light" : "dark";
    try { localStorage.setItem("trl theme", chosen); } catch { /* until it is closed */ }
  }
  if (chosen) document.documentElement.dataset.theme = chosen;
}

// -- keys ----------------------------------------------------------------------------------------

const TOOLS = {
  u: () => undo(state.last), s: () => answer("skip", "Skipped"), f: toggleFlag, h: showHistory,
  g: () => { $("guidelines").open = !$("guidelines").open; }, c: () => $("comment").focus(),
  e: enough, "?": () => $("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || document.querySelector("dialog[open]")) return;
  if (event.target === $("comment")) {
    if (event.key === "Escape") focusItem();
    return;
  }
  if (!state || busy) return;
  const choice = state.item && choices().find(({keys}) => keys.includes(event.key));
  const tool = TOOLS[event.key.toLowerCase()];
  if (!choice && (!tool || (!state.item && "sfc".includes(event.key.toLowerCase())))) return;
  event.preventDefault();
  if (choice) answer(choice.answer, choice.label);
  else tool();
});

$("undo").addEventListener("click", () => undo(state.last));
$("skip").addEventListener("click", TOOLS.s);
$("flag").addEventListener("click", toggleFlag);
$("enough").addEventListener("click", enough);
$("again").addEventListener("click", refresh);
$("show-history").addEventListener("click", showHistory);
$("show-help").addEventListener("click", TOOLS["?"]);
$("theme").addEventListener("click", () => theme(true));
$("comment").addEventListener("input", keepDraft);
addEventListener("pagehide", keepDraft);
document.addEventListener("visibilitychange", () => {  // time away does not count
  spent = seconds();
  started = document.hidden ? 0 : performance.now();
  keepDraft();
});
narrow.addEventListener("change", () => { if (state && !busy) showItem(); });
$("guidelines").addEventListener("toggle", () => { if (state) keep("guidelines", $("guidelines").open ? "open" : "shut"); });

// -- the start -----------------------------------------------------------------------------------

// The token stands behind the #, which no server and no log sees.
async function start() {
  theme(false);
  const token = new URLSearchParams(location.hash.slice(1)).get("join");
  if (token) {
    history.replaceState(null, "", "/");
    try {
      await insist("/api/join", {token});
      return location.reload();  // with the guidelines, which only who is signed in may see
    } catch (error) {
      try { await ask("/api/state"); } catch {
        $("join").hidden = false;
        return trouble(error.message);
      }
    }
  }
  await load();
  if (state) $("guidelines").open = keep("guidelines") !== "shut";
}

addEventListener("hashchange", start);
start();
