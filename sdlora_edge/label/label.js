// The page works without this script. With it, nothing jumps: the answer to a form takes the page's place, names are kept
// as soon as they are typed, and the number of selected images is told.
"use strict";

function told() {
  const count = document.querySelectorAll("[name=image]:checked").length;
  document.querySelector("#count").textContent = count ? `${count} selected` : "none selected";
  for (const button of document.querySelectorAll(".all")) {
    button.hidden = false;
    const own = [...button.closest("section").querySelectorAll("[name=image]")];
    button.textContent = own.every((box) => box.checked) ? "Select none" : "Select all";
  }
}

let waiting = Promise.resolve(); // one request after the other: each has all names
async function send(form, what) {
  const data = new URLSearchParams(new FormData(form));
  for (const [name, value] of Object.entries(what)) data.set(name, value);
  const answer = await fetch(form.action, { method: "POST", body: data });
  if (!answer.ok) throw new Error(answer.statusText);
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const moved = what.do === "move" || what.do === "throw";
  const keep = moved ? [] : [...document.querySelectorAll("[name=image]:checked")].map((box) => box.id);
  const typed = document.activeElement;
  const [id, value, to] = [typed?.id, typed?.value, document.querySelector("#to").value];
  document.querySelector("main").replaceWith(page.querySelector("main"));
  for (const one of keep) document.getElementById(one).checked = true;
  const select = document.querySelector("#to");
  if ([...select.options].some((option) => option.value === to)) select.value = to;
  const again = (id && document.getElementById(id)) || document.querySelector("#to");
  if (id?.startsWith("name-") && again.id === id) again.value = value; // what is typed meanwhile stays
  if (id) again.focus({ preventScroll: true });
  told();
}

function submit(form, what) {
  waiting = waiting.then(() => send(form, what)).catch(() => {
    const said = document.querySelector("#said");
    said.textContent = "The program does not answer: is it still running?";
    said.className = "alarm";
  });
}

document.addEventListener("submit", (event) => {
  event.preventDefault();
  submit(event.target, { do: event.submitter?.value ?? "names" });
});
document.addEventListener("change", (event) => {
  if (event.target.name?.startsWith("name-")) submit(event.target.form, { do: "names" });
  told();
});
document.addEventListener("click", (event) => {
  if (!event.target.matches(".all")) return;
  const own = [...event.target.closest("section").querySelectorAll("[name=image]")];
  const checked = !own.every((box) => box.checked);
  for (const box of own) box.checked = checked;
  told();
});
told();
