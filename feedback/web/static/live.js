// Draws the dashboard again every few seconds, while it is looked at.
"use strict";

const live = document.getElementById("live");
const state = document.getElementById("live-state");

// Who has moved a wide table, or stands in it with the keyboard, stays where they are.
function draw(text) {
  const parts = () => Array.from(live.querySelectorAll(".scroll"));
  const places = new Map(parts().map((part) => [part.getAttribute("aria-label"), part.scrollLeft]));
  const here = live.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
  live.innerHTML = text; // made by the server's templates, which escape
  for (const part of parts()) {
    const label = part.getAttribute("aria-label");
    part.scrollLeft = places.get(label) || 0;
    if (label === here) part.focus({ preventScroll: true });
  }
}

async function refresh() {
  if (document.hidden) return;
  try {
    const reply = await fetch(live.dataset.source, { headers: { Accept: "text/html" } });
    if (!reply.ok || reply.redirected) throw new Error(reply.status);
    draw(await reply.text());
    state.textContent = "up to date";
  } catch {
    state.textContent = "no connection; these numbers are old";
  }
}

setInterval(refresh, 5000);
