// Everything works without this: it refreshes the page, shows filters at once, and local times.
"use strict";
const REFRESH = 60000;

function local(root) {
  for (const time of root.querySelectorAll("time")) {
    const found = new Date(time.dateTime);
    if (!Number.isNaN(found.getTime())) time.title = found.toLocaleString();
  }
}

async function refresh() {
  if (document.hidden || document.activeElement?.closest("form")) return;
  const answer = await fetch(location.href, { headers: { accept: "text/html" } });
  if (answer.redirected) location.reload(); // the session has ended
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const name of ["main", "header"]) {
    const old = document.querySelector(name);
    const places = [...old.querySelectorAll(".scroll")].map((s) => [s.scrollLeft, s.scrollTop]);
    old.replaceWith(page.querySelector(name));
    document.querySelectorAll(`${name} .scroll`).forEach((s, i) => {
      if (places[i]) [s.scrollLeft, s.scrollTop] = places[i];
    });
  }
  local(document);
}

document.addEventListener("change", (event) => {
  const form = event.target.closest(".filters");
  if (form) form.requestSubmit();
});
local(document);
setInterval(() => refresh().catch(() => {}), REFRESH);
