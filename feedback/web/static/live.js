// Draws the dashboard again every few seconds, while it is looked at.
"use strict";

const live = document.getElementById("live");
const state = document.getElementById("live-state");

async function refresh() {
  if (document.hidden) return;
  try {
    const reply = await fetch(live.dataset.source, { headers: { Accept: "text/html" } });
    if (!reply.ok || reply.redirected) throw new Error(reply.status);
    live.innerHTML = await reply.text(); // made by the server's templates, which escape
    state.textContent = "up to date";
  } catch {
    state.textContent = "no connection; these numbers are old";
  }
}

setInterval(refresh, 5000);
