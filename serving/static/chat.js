/* The page: asks the chat endpoint with streaming, shows the pieces, and sends thumbs for answers that were kept. */
"use strict";
const get = (id) => document.getElementById(id);
const log = get("log"), text = get("text"), status = get("status"), consent = get("consent");
const ask = get("ask"), door = get("door"), model = document.body.dataset.model;
let messages = [], key = "", running = null, conversation = crypto.randomUUID();

function headers() {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/* A name for this browser, made when it is needed first; the server keeps a hash of it. */
function user() {
  let name = localStorage.getItem("rlhf-user");
  if (!name) localStorage.setItem("rlhf-user", (name = crypto.randomUUID()));
  return name;
}

function show(role, content) {
  const box = document.createElement("div");
  box.className = role === "user" ? "message" : "message assistant";
  const speaker = document.createElement("p");
  speaker.className = "speaker";
  speaker.textContent = role === "user" ? "You" : model;
  const body = document.createElement("div");
  body.textContent = content;
  box.append(speaker, body);
  log.append(box);
  box.scrollIntoView({ block: "nearest" });
  return { box, body, speaker };
}

async function failure(reply) {
  try { return (await reply.json()).error.message; } catch { return `the server said ${reply.status}`; }
}

/* The JSON bodies of a stream of server-sent events. */
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const body = JSON.parse(data);
      if (body.error) throw new Error(body.error.message);
      yield body;
    }
  }
}

async function answer(agreed) {
  const request = { model, messages, stream: true, metadata: { conversation, ...(agreed ? { consent: "true" } : {}) } };
  const shown = show("assistant", "…");
  let whole = "", id = "", stored = false;
  try {
    const reply = await fetch("/v1/chat/completions",
      { method: "POST", headers: headers(), body: JSON.stringify(request), signal: running.signal });
    if (!reply.ok) throw new Error(await failure(reply));
    shown.speaker.textContent = reply.headers.get("x-model-version") || model;
    for await (const body of events(reply)) {
      id = body.id;
      stored = stored || Boolean(body.feedback && body.feedback.stored);
      const piece = body.choices.length ? body.choices[0].delta.content : "";
      if (piece) { whole += piece; shown.body.textContent = whole; shown.box.scrollIntoView({ block: "nearest" }); }
    }
    shown.body.textContent = whole || "(an empty answer)";
    if (stored) rate(shown.box, id);
  } catch (error) {
    if (error.name === "AbortError") { shown.body.textContent = whole || "(stopped)"; }
    else { shown.body.textContent = `${whole} ${error.message}`.trim(); shown.box.classList.add("failed"); messages.pop(); return; }
  }
  messages.push({ role: "assistant", content: whole });
}

/* Thumbs below an answer that the server has kept. */
function rate(box, id) {
  const part = get("rating").content.cloneNode(true).firstElementChild;
  const [up, down] = part.querySelectorAll("button"), form = part.querySelector("form");
  const said = part.querySelector(".said"), comment = form.querySelector("input");
  let rating = "";
  async function send(wanted, words) {
    const body = { id, rating: wanted, user: user(), ...(words ? { comment: words } : {}) };
    try {
      const reply = await fetch("/v1/feedback", { method: "POST", headers: headers(), body: JSON.stringify(body) });
      if (!reply.ok) throw new Error(await failure(reply));
    } catch (error) { said.textContent = `Not kept: ${error.message}`; return; }
    rating = wanted;
    up.setAttribute("aria-pressed", String(rating === "up"));
    down.setAttribute("aria-pressed", String(rating === "down"));
    form.hidden = Boolean(words);
    said.textContent = words ? "Thank you, your comment is kept." : "Thank you, it is kept; you may change it.";
  }
  up.addEventListener("click", () => send("up"));
  down.addEventListener("click", () => send("down"));
  form.addEventListener("submit", (event) => { event.preventDefault(); send(rating, comment.value.trim()); });
  box.after(part);
}

async function submit() {
  const content = text.value.trim();
  if (!content || running) return;
  running = new AbortController();
  get("send").disabled = true; get("stop").hidden = false; status.textContent = "Writing …";
  show("user", content);
  messages.push({ role: "user", content });
  text.value = "";
  await answer(Boolean(consent && consent.checked));
  running = null;
  get("send").disabled = false; get("stop").hidden = true; status.textContent = "";
  text.focus();
}

ask.addEventListener("submit", (event) => { event.preventDefault(); submit(); });
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
get("stop").addEventListener("click", () => running && running.abort());
get("anew").addEventListener("click", () => {
  if (running) running.abort();
  messages = []; conversation = crypto.randomUUID(); log.replaceChildren(); text.focus();
});
if (door) door.addEventListener("submit", (event) => {
  event.preventDefault();
  key = get("key").value.trim();
  door.hidden = true;
  text.focus();
});
