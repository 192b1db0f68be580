/** The page: what people drop goes to the device, and what it answers is shown. */

// @ts-ignore: it has no types
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
import { dropped, sorted } from "./drops.js";
import { decode, IndexedDbStore, urlReader } from "./src/browser.js";
import { onnxEngine } from "./src/engine.js";
import { Device, Refused, openBundle } from "./src/index.js";
import { answer, element, logged, spoken, verdict } from "./view.js";

/** @typedef {import("./view.js").Prediction} Prediction */
/** @typedef {{blob: Blob, name: string, card: HTMLElement, last: Prediction | null}} Shown */

const TOP = 3; // classes that an answer shows
const MAX_ANSWERS = 48;
const CAMERA_PAUSE = 250; // milliseconds between two answers, for the rest of the page
/** @type {Record<number, string>} */
const REASONS = {
  3: "damaged",
  4: "not trusted",
  5: "not for this device",
  6: "the canary failed",
  8: "it could not be kept",
};

/** @type {(id: string) => any} */
const by = (id) => document.getElementById(id);
const store = new IndexedDbStore("sdlora-edge");
const engine = onnxEngine(ort);
/** @type {Device | null} */
let device = null;
/** Whether the browser keeps the page's files. */
let kept = false;
/** @type {Shown[]} */
let shown = [];
/** Names of the classes that the last update brought. @type {string[]} */
let fresh = [];
/** @type {Promise<void>} */
let queue = Promise.resolve();

/**
 * One thing after the other: a session answers one request at a time.
 *
 * @param {() => Promise<void>} work
 */
function next(work) {
  queue = queue.then(work).catch((error) => tell(error));
  return queue;
}

/** @param {unknown} error */
function tell(error) {
  by("problem").textContent = error instanceof Error ? error.message : String(error);
  by("problem").hidden = false;
}

/** @param {string} text For a screen reader. */
function say(text) {
  by("said").textContent = text;
}

/**
 * @param {string} text
 * @param {() => Promise<void>} work
 */
async function working(text, work) {
  by("working").querySelector("span").textContent = text;
  by("working").hidden = false;
  try {
    await work();
  } finally {
    by("working").hidden = true;
  }
}

function showDevice() {
  by("offline").hidden = !(device && kept);
  document.querySelector("main")?.classList.toggle("without", !device);
  by("with").hidden = !device;
  by("without").hidden = Boolean(device);
  for (const id of ["image-files", "packet-files", "camera"]) by(id).disabled = !device;
  if (!device) return;
  const { model, task, task_name, state, packets, trust_version, classes } = device.status();
  by("name").textContent = model;
  by("task").textContent = `${task}${task_name ? ` (${task_name})` : ""}`;
  by("packets").textContent = packets;
  by("state").textContent = state.slice(0, 16);
  by("state").title = state;
  by("keys").textContent = `version ${trust_version}`;
  by("classes-title").textContent = `${classes.length} classes`;
  by("classes").replaceChildren(
    ...classes.map((text) => element("li", { text, class: fresh.includes(text) ? "new" : "" })),
  );
  by("no-answers").textContent = "Drop an image: its answer appears here.";
}

/** Serve what the store holds. */
async function wake() {
  by("again").hidden = false; // even if it cannot be served
  device = await Device.open(store, engine);
  const { damage } = device.status();
  if (damage) tell(damage);
  showDevice();
}

/** @param {import("./drops.js").Read} read */
function open(read) {
  by("problem").hidden = true;
  return next(() =>
    working("Reading the bundle", async () => {
      const bundle = await openBundle(async (name) => {
        by("working").querySelector("span").textContent = `Reading ${name}`;
        return read(name);
      });
      await Device.init(bundle, store);
      navigator.storage.persist?.(); // else the browser may delete it to make room
      await wake().catch(async (error) => {
        await store.clear(); // so that another bundle can be opened
        by("again").hidden = true;
        throw error;
      });
      say("The bundle is open.");
    }),
  );
}

/** @param {File} file A packet. */
async function apply(file) {
  if (!device) throw new Error("no bundle is open: open one first, then drop the packet");
  const before = device.status().classes;
  /** @type {HTMLElement} */
  let entry;
  try {
    await device.apply(new Uint8Array(await file.arrayBuffer()));
    const { classes, task } = device.status();
    fresh = classes.filter((name) => !before.includes(name));
    const names = fresh.length ? `New classes: ${fresh.join(", ")}.` : "No new class.";
    entry = logged("taken", "Applied", file.name, `Task ${task}. ${names}`);
    showDevice();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    const same = error.exitCode === 7;
    const reason = `${REASONS[error.exitCode]} (exit code ${error.exitCode})`;
    entry = logged(
      same ? "same" : "refused",
      same ? "Nothing to do" : `Refused: ${reason}`,
      file.name,
      error.message,
      same ? "" : "The model has not changed.",
    );
  }
  by("log").prepend(entry);
  for (const one of shown) await predict(one);
}

/** @param {Shown} one */
async function predict(one) {
  if (!device) return;
  const before = one.last;
  try {
    one.last = await device.predict(await decode(one.blob), { top: TOP });
  } catch (error) {
    one.card.className = "answer refused";
    one.card.lastElementChild?.replaceWith(element("p", { class: "verdict", text: unreadable(error) }));
    say(`${one.name}: ${unreadable(error)}`);
    return;
  }
  const changed = before !== null && verdict(before) !== verdict(one.last);
  one.card.className = `answer ${changed ? "changed" : ""}`;
  one.card.lastElementChild?.replaceWith(answer(one.last, changed ? verdict(before) : ""));
  if (before === null || changed) say(`${one.name}: ${spoken(one.last)}`);
}

/** @param {any} error */
function unreadable(error) {
  const unknown = error instanceof DOMException; // its own text names no remedy
  return unknown ? "This browser cannot read the file: save it as JPEG or PNG." : error.message;
}

/** @param {File} file An image. */
function add(file) {
  const picture = /** @type {HTMLImageElement} */ (element("img", { alt: "" }));
  picture.src = URL.createObjectURL(file);
  const card = element(
    "li",
    { class: "answer" },
    element("div", {}, picture, element("p", { class: "name", text: file.name, title: file.name })),
    element("p", { class: "note", text: "Waiting" }),
  );
  const one = { blob: file, name: file.name, card, last: null };
  shown.unshift(one);
  by("answers").prepend(card);
  by("no-answers").hidden = true;
  for (const old of shown.splice(MAX_ANSWERS)) {
    URL.revokeObjectURL(/** @type {any} */ (old.card.querySelector("img")).src);
    old.card.remove();
  }
  next(() => predict(one));
}

/** @param {import("./drops.js").Found[]} found */
function take(found) {
  by("problem").hidden = true;
  const { bundle, packets, images, others } = sorted(found);
  if (bundle && device) {
    tell("a bundle is open already: to open another one, delete this device first (under Model)");
  } else if (bundle) {
    open(bundle);
  }
  for (const packet of packets) next(() => apply(packet));
  if (images.length && !device) tell("no bundle is open: open one first, then drop images");
  else images.forEach(add);
  if (others.length) {
    tell(`${others[0].name} is no image, packet or bundle: drop a JPEG, a .sdlora or a folder`);
  }
}

/** Answers for the camera, until it is switched off. */
async function watch() {
  const video = by("video");
  const button = by("camera");
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  video.srcObject = stream;
  await video.play();
  button.setAttribute("aria-pressed", "true");
  by("live").hidden = false;
  let last = "";
  while (button.getAttribute("aria-pressed") === "true") {
    await next(async () => {
      if (!device) return;
      const found = await device.predict(await decode(video), { top: TOP });
      by("live-answer").replaceChildren(answer(found, ""));
      if (verdict(found) !== last) say(spoken(found));
      last = verdict(found);
    });
    await new Promise((resolve) => setTimeout(resolve, CAMERA_PAUSE));
  }
  for (const track of stream.getTracks()) track.stop();
  video.srcObject = null;
  by("live").hidden = true;
}

function listen() {
  for (const id of ["image-files", "packet-files", "bundle-files"]) {
    by(id).addEventListener("change", () => {
      /** @type {File[]} */
      const files = [...by(id).files];
      take(files.map((file) => ({ file, path: file.webkitRelativePath || file.name })));
      by(id).value = ""; // so that the same file can be chosen again
    });
  }
  by("bundle-form").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    open(urlReader(by("bundle-url").value));
  });
  by("camera").addEventListener("click", () => {
    const on = by("camera").getAttribute("aria-pressed") === "true";
    if (on) by("camera").setAttribute("aria-pressed", "false");
    else watch().catch((error) => tell(`the camera gives no images: ${error.message}`));
  });
  by("forget").addEventListener("click", () =>
    next(async () => {
      await store.clear();
      location.replace(location.pathname);
    }),
  );
  const dragged = (/** @type {boolean} */ on) => document.body.classList.toggle("dragged", on);
  addEventListener("dragover", (event) => {
    event.preventDefault();
    dragged(true);
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) dragged(false);
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    dragged(false);
    if (event.dataTransfer) dropped(event.dataTransfer).then(take, tell);
  });
}

async function workOffline() {
  await navigator.serviceWorker.register("sw.js");
  await navigator.serviceWorker.ready;
  kept = true;
  showDevice();
}

async function start() {
  listen();
  showDevice();
  if (!isSecureContext) {
    throw new Error("a browser verifies signatures on secure pages only: use https or localhost");
  }
  workOffline().catch((error) => console.warn(`this page does not work offline: ${error.message}`));
  if (await store.exists()) {
    await next(() => working("Checking the model", wake));
  }
  const url = new URLSearchParams(location.search).get("bundle");
  if (url) by("bundle-url").value = url;
  if (url && by("again").hidden) open(urlReader(url));
}

start().catch(tell);
