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

// After a name, only what says something about it changes: somebody may be clicking on the rest.
function update(page) {
  for (const fresh of page.querySelectorAll(".live")) {
    const old = document.getElementById(fresh.id);
    if (old && old.outerHTML !== fresh.outerHTML) old.replaceWith(fresh);
  }
}

function replace(page, isMove) {
  const ids = [...document.querySelectorAll("[name=image]:checked")].map((box) => box.id);
  const id = document.activeElement?.id;
  const to = document.querySelector("#to").value;
  document.querySelector("main").replaceWith(page.querySelector("main"));
  for (const one of isMove ? [] : ids) document.getElementById(one).checked = true;
  const select = document.querySelector("#to");
  if ([...select.options].some((option) => option.value === to)) select.value = to;
  if (id) (document.getElementById(id) ?? select).focus({ preventScroll: true });
}

let waiting = Promise.resolve(); // one request after the other: each has all names
async function send(form, what) {
  const data = new URLSearchParams(new FormData(form));
  data.set("do", what);
  const answer = await fetch(form.action, { method: "POST", body: data });
  if (!answer.ok) throw new Error(answer.statusText);
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  if (what === "names") update(page);
  else replace(page, what === "move" || what === "throw");
  told();
}

function submit(what) {
  waiting = waiting.then(() => send(document.querySelector("form"), what)).catch(() => {
    const said = document.querySelector("#said");
    said.textContent = "The program does not answer: is it still running?";
    said.className = "alarm";
  });
}

document.addEventListener("submit", (event) => {
  event.preventDefault();
  submit(event.submitter?.value ?? "names");
});
document.addEventListener("change", (event) => {
  if (event.target.name?.startsWith("name-")) submit("names");
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
