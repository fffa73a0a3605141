// Keys, drafts and sending for one item. The page works without this: it is forms.
// A draft lies in localStorage with its idempotency key until the server has the vote, so a lost connection, a
// reload or a second click loses nothing and counts nothing twice.
"use strict";

const task = document.getElementById("task");
const vote = document.getElementById("vote");
const turn = document.getElementById("turn");
const status = document.getElementById("status");
const kind = task.dataset.kind;
const draftName = `rlhf-draft/${task.dataset.project}/${task.dataset.item}`;
const KEPT_DAYS = 30;
document.documentElement.classList.add("scripted");

// ---- drafts ----

function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function loadDraft() {
  try {
    const found = JSON.parse(localStorage.getItem(draftName));
    if (found && found.key) return found;
  } catch { /* storage is off or the draft is not ours: begin anew */ }
  return { key: newKey(), turnKey: newKey(), seconds: 0, fields: {}, turn: "" };
}

const draft = loadDraft();

function saveDraft() {
  draft.fields = {};
  for (const [name, value] of new FormData(vote)) {
    if (!["csrf", "item", "key", "seconds"].includes(name)) draft.fields[name] = value;
  }
  if (turn) draft.turn = turn.elements.text.value;
  draft.at = Date.now();
  try { localStorage.setItem(draftName, JSON.stringify(draft)); } catch { /* private mode: nothing to keep it in */ }
}

function dropDraft() {
  try { localStorage.removeItem(draftName); } catch { /* as above */ }
}

// What was sent stays for a day under a new key: who takes a vote back finds the answer and changes it.
function keepSent() {
  draft.key = newKey();
  draft.seconds = 0;
  draft.sent = true;
  saveDraft();
}

function dropOldDrafts() {
  try {
    for (const name of Object.keys(localStorage)) {
      if (!name.startsWith("rlhf-draft/")) continue;
      const { at = 0, sent = false } = JSON.parse(localStorage.getItem(name));
      if (Date.now() - at > (sent ? 1 : KEPT_DAYS) * 86400e3) localStorage.removeItem(name);
    }
  } catch { /* as above */ }
}

function restoreDraft() {
  for (const [name, value] of Object.entries(draft.fields)) {
    const field = vote.elements[name];
    if (field) field.value = value;
  }
  if (turn && draft.turn) turn.elements.text.value = draft.turn;
  vote.elements.key.value = draft.key;
  if (turn) turn.elements.key.value = draft.turnKey;
}

// Time in which the page was looked at.
let since = document.hidden ? null : performance.now();
function elapsed() {
  if (since !== null) {
    draft.seconds += (performance.now() - since) / 1000;
    since = performance.now();
  }
  return draft.seconds;
}
document.addEventListener("visibilitychange", () => {
  if (document.hidden) { elapsed(); since = null; saveDraft(); } else { since = performance.now(); }
});

// ---- sending ----

function say(text, tone = "", link = null) {
  status.hidden = false;
  status.className = `notice ${tone}`;
  status.textContent = text;
  if (link) {
    const anchor = document.createElement("a");
    anchor.href = link.href;
    anchor.textContent = link.text;
    status.append(" ", anchor);
  }
}

let sending = false;
const WAITS = [2, 4, 8, 15, 30];

async function send(form, done) {
  if (sending) return;
  sending = true;
  try {
    for (let tries = 0; ; tries += 1) {
      const wait = await sendOnce(form, done, WAITS[Math.min(tries, WAITS.length - 1)]);
      if (!wait) return;
      await pause(wait);
    }
  } finally {
    sending = false;
  }
}

// Gives the seconds to wait before another try, or 0 when that is settled.
async function sendOnce(form, done, wait) {
  let reply;
  try {
    reply = await fetch(form.action, {
      method: "POST",
      body: new URLSearchParams(new FormData(form)),
      headers: { Accept: "application/json" },
      signal: AbortSignal.timeout(form === turn ? 180000 : 20000),
    });
  } catch {
    say(`No connection. What you did is kept on this device and is sent again in ${wait} s.`, "warn");
    return wait;
  }
  const answer = await reply.json().catch(() => ({}));
  if (reply.ok) {
    done();
    location.replace(answer.next || location.href);
    return 0;
  }
  if (reply.status === 429 || reply.status === 503 || reply.status === 500) {
    say(`Not saved yet: ${answer.error || "the server is busy"}. It is kept here and sent again in ${wait} s.`, "warn");
    return wait;
  }
  if (reply.status === 401) {
    say(answer.error, "bad", { href: "/login", text: "Sign in" });
  } else if (answer.new_key) {
    draft.key = newKey();
    vote.elements.key.value = draft.key;
    saveDraft();
    say(answer.error, "warn");
  } else if (reply.status === 409) {
    dropDraft();
    say(answer.error, "bad", { href: location.href, text: "Go on" });
  } else {
    say(answer.error || `The server refused this (${reply.status}).`, "bad");
  }
  return 0;
}

function pause(seconds) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, seconds * 1000);
    addEventListener("online", () => { clearTimeout(timer); resolve(); }, { once: true });
  });
}

function sendVote() {
  if (vote.hidden) { say("Say something to the two first."); return; }
  if (!vote.reportValidity()) return;
  if (vote.elements.seconds) vote.elements.seconds.value = elapsed().toFixed(2);
  saveDraft();
  say("Sending …");
  send(vote, keepSent);
}

function sendTurn() {
  if (!turn.reportValidity()) return;
  saveDraft();
  say("Both are writing …");
  send(turn, () => { draft.turn = ""; turn.elements.text.value = ""; draft.turnKey = newKey(); saveDraft(); });
}

// Skips, flags and undos too: a reason is not lost with the connection, and none of them counts twice.
function sendTool(form) {
  if (!form.reportValidity()) return;
  say("Sending …");
  send(form, form.id === "undo" ? () => {} : dropDraft);
}

vote.addEventListener("submit", (event) => { event.preventDefault(); sendVote(); });
for (const form of document.querySelectorAll(".tools form")) {
  form.addEventListener("submit", (event) => { event.preventDefault(); sendTool(form); });
}
if (turn) turn.addEventListener("submit", (event) => { event.preventDefault(); sendTurn(); });
for (const form of [vote, turn]) if (form) form.addEventListener("input", () => { mark(); saveDraft(); });

// ---- what a key does to each kind of question ----

const chosen = () => (vote.elements.choice ? vote.elements.choice.value : "");

function chooseSide(side) {
  const [position, strength] = chosen().split(":");
  const next = position === side && strength ? (Number(strength) % 3) + 1 : 1;
  vote.elements.choice.value = `${side}:${next}`;
}

const choiceKeys = {
  1: () => chooseSide("0"),
  2: () => chooseSide("1"),
  0: () => { vote.elements.choice.value = "tie"; },
  b: () => { vote.elements.choice.value = "bad"; },
};
const labelKeys = {
  1: () => { vote.elements.label.value = "good"; },
  2: () => { vote.elements.label.value = "bad"; },
};

// Ranking: the list stands in the order of the ranks; the selects hold them.
const list = document.getElementById("ranking");
const rows = list ? Array.from(list.children) : [];
const selectOf = (row) => row.querySelector("select");
let placed = [];
let tieNext = false;

function place(row) {
  if (placed.includes(row)) return;
  const last = placed.length ? Number(selectOf(placed[placed.length - 1]).value) : 0;
  selectOf(row).value = String(tieNext && last ? last : last + 1);
  tieNext = false;
  placed.push(row);
  const left = rows.filter((one) => !placed.includes(one));
  if (left.length === 1 && rows.length > 1) return place(left[0]);
  list.append(...placed, ...left);
}

function startOver() {
  placed = [];
  tieNext = false;
  rows.forEach((row) => { selectOf(row).value = ""; });
  list.append(...rows);
}

function ranksFromList() {
  placed = Array.from(list.children);
  placed.forEach((row, index) => { selectOf(row).value = String(index + 1); });
  mark();
  saveDraft();
}

function sortByRanks() {
  const rank = (row) => Number(selectOf(row).value || 99);
  placed = rows.filter((row) => selectOf(row).value).sort((one, other) => rank(one) - rank(other));
  list.append(...placed, ...rows.filter((row) => !placed.includes(row)));
}

function rankingKey(key) {
  if (key === "x") startOver();
  else if (key === "=") { tieNext = true; say("The next number ties with the one before."); }
  else if (rows[Number(key) - 1]) place(rows[Number(key) - 1]);
  else return false;
  return true;
}

if (list) {
  list.addEventListener("click", (event) => {
    const move = Number(event.target.dataset.move);
    if (!move) return;
    const row = event.target.closest("li");
    const other = move < 0 ? row.previousElementSibling : row.nextElementSibling;
    if (other) (move < 0 ? other : row).before(move < 0 ? row : other);
    ranksFromList();
    event.target.focus();
    say(`Answer ${row.dataset.letter} is now on rank ${selectOf(row).value}.`);
  });
  let held = null;
  list.addEventListener("pointerdown", (event) => {
    if (!event.target.classList.contains("handle")) return;
    held = event.target.closest("li");
    held.classList.add("held");
    event.target.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  list.addEventListener("pointermove", (event) => {
    if (!held) return;
    for (const row of list.children) {
      const box = row.getBoundingClientRect();
      if (row === held || event.clientY < box.top || event.clientY > box.bottom) continue;
      if (event.clientY < box.top + box.height / 2) row.before(held); else row.after(held);
      break;
    }
  });
  const drop = () => {
    if (!held) return;
    held.classList.remove("held");
    held = null;
    ranksFromList();
  };
  list.addEventListener("pointerup", drop);
  list.addEventListener("pointercancel", drop);
}

// Ratings: one line is marked; digits rate it and go on.
const scales = Array.from(vote.querySelectorAll(".scale"));
let line = 0;

function toLine(number) {
  line = Math.max(0, Math.min(scales.length - 1, number));
  scales.forEach((scale, index) => scale.classList.toggle("here", index === line));
}

function ratingKey(key) {
  if (key === "ArrowDown" || key === "ArrowUp") { toLine(line + (key === "ArrowDown" ? 1 : -1)); return true; }
  if (!/^[0-9]$/.test(key)) return false;
  const wanted = key === "0" ? "10" : key;
  const field = Array.from(scales[line].querySelectorAll("input")).find((one) => one.value === wanted);
  if (!field) return false;
  field.checked = true;
  toLine(line + 1);
  return true;
}

function questionKey(key) {
  const table = { pairwise: choiceKeys, chat: choiceKeys, label: labelKeys }[kind];
  if (table) {
    if (!table[key] || vote.hidden) return false;
    table[key]();
    return true;
  }
  if (kind === "ranking") return rankingKey(key);
  if (kind === "rating") return ratingKey(key);
  return false;
}

// ---- keys of every kind ----

function mark() {
  const side = chosen().split(":")[0];
  document.querySelectorAll("#task > .answers .answer").forEach((answer, index) => {
    answer.classList.toggle("picked", String(index) === side);
  });
}

// Opening moves the focus inside; closing gives it back, so that Enter sends the vote again.
let before = null;

function toggle(id) {
  const details = document.getElementById(id);
  if (!details) return;
  if (details.open) { close(details); return; }
  before = document.activeElement;
  details.open = true;
  (details.querySelector("input:not([type=hidden])") || details.querySelector("summary")).focus();
}

function close(details) {
  details.open = false;
  document.activeElement.blur();
  if (before && before !== document.body && !details.contains(before)) before.focus();
}

const commonKeys = {
  s: () => toggle("skip"),
  f: () => toggle("flag"),
  g: () => toggle("guidelines"),
  "?": () => toggle("help"),
  u: () => { const button = document.querySelector("#undo button"); if (button && !button.disabled) button.click(); },
  e: () => { const text = (turn || vote).elements.text; if (text) text.focus(); },
};

const singleKeys = document.getElementById("single-keys");
if (singleKeys) {
  try { singleKeys.checked = localStorage.getItem("rlhf-single-keys") !== "off"; } catch { /* as above */ }
  singleKeys.addEventListener("change", () => {
    try { localStorage.setItem("rlhf-single-keys", singleKeys.checked ? "on" : "off"); } catch { /* as above */ }
  });
}

function isWriting(target) {
  return target.tagName === "TEXTAREA" || (target.tagName === "INPUT" && !["radio", "checkbox"].includes(target.type));
}

document.addEventListener("keydown", (event) => {
  const target = event.target;
  if (event.key === "Enter" && event.ctrlKey) {
    event.preventDefault();
    const tool = target.closest(".tools form");
    if (turn && turn.contains(target)) sendTurn(); else if (tool) sendTool(tool); else sendVote();
    return;
  }
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
  if (event.key === "Escape") {
    const open = target.closest("details[open]");
    if (open) close(open); else target.blur();
    return;
  }
  if (isWriting(target)) return;
  if (event.key === "Enter") {
    if (target.closest("button, a, summary, select")) return;
    event.preventDefault();
    sendVote();
    return;
  }
  if (singleKeys && !singleKeys.checked) return;
  if (target.tagName === "SELECT") return;
  if (questionKey(event.key)) {
    event.preventDefault();
    mark();
    saveDraft();
  } else if (commonKeys[event.key]) {
    event.preventDefault();
    commonKeys[event.key]();
  }
});

dropOldDrafts();
restoreDraft();
if (list) { if (rows.some((row) => selectOf(row).value)) sortByRanks(); list.addEventListener("change", sortByRanks); }
if (scales.length) {
  scales.forEach((scale, index) => scale.addEventListener("focusin", () => toLine(index)));
  const open = scales.findIndex((scale) => !scale.querySelector("input:checked"));
  toLine(open < 0 ? scales.length - 1 : open);
}
mark();
