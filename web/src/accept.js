/** May an update follow? Section 3 of docs/packet.md, a rule for each row of the table. */

import { byName } from "./canonical.js";
import { need, whole } from "./check.js";
import { isRevoked } from "./control.js";
import { ENCODINGS, floats } from "./encoding.js";
import { follow, live } from "./task.js";

/** @typedef {import("./task.js").State} State */
/** @typedef {import("./control.js").Version} Version */

/**
 * @typedef {object} Standing Where a device stands.
 * @property {State} state
 * @property {number} revision Of the packet that led to it.
 * @property {Version} highest The highest (revision, task) ever confirmed here; revision first.
 * @property {Version[]} revoked
 * @property {boolean} allowOlder Take what is not above `highest`.
 */

/**
 * @typedef {object} Update An update that may follow.
 * @property {State} state The state after it.
 * @property {number} revision Of its last task.
 * @property {Version[]} versions Of its tasks.
 * @property {{seed: number, logits: Float32Array, count: number}} canary
 */

/**
 * @param {any} manifest
 * @param {import("./container.js").Tensors} tensors
 * @param {any} bundle The manifest of the bundle.
 * @param {Standing} standing
 * @returns {Promise<Update>}
 */
export async function accepted(manifest, tensors, bundle, standing) {
  const { tasks, encoding } = manifest;
  need(ENCODINGS.includes(encoding), `encoding ${encoding} is not known: update this program`);
  const t = whole(manifest.sequence, "the task");
  const a = t - tasks.length;
  const count = tasks.length;
  need(1 <= count && count <= 1000 && a >= 0, `${count} tasks lead to task ${t}: get it again`);
  /** @type {number[]} */
  const revisions = tasks.map((/** @type {any} */ task) => whole(task.revision, "the revision"));
  const rising = revisions.every((r, i) => i === 0 || revisions[i - 1] <= r);
  need(rising, "revisions fall: get the packet again");
  const revision = revisions[count - 1];
  const canary = checkedCanary(manifest, tensors);

  const s = standing.state.task;
  const digest = standing.state.digest;
  const lineage = manifest.lineage === bundle.states[0];
  need(lineage, "it is of another lineage: build packets from this bundle's run", 5);
  const held = [digest, ...standing.state.before].includes(manifest.to);
  need(!held, `packet ${t} is applied already`, 7);
  const newer = a < s && revision > standing.revision;
  need(!newer, `packet ${t} is a newer revision of a task that is held: roll back first`, 5);
  need(t > s, `packet ${t} is a replay: this device is at task ${s} already`, 4);
  const remedy = a < s ? "apply the packets of single tasks" : `apply packet ${s + 1} first`;
  const problem = a === s ? "it was built on another state: build it again" : remedy;
  need(a === s && manifest.from === digest, `packet ${t} does not follow task ${s}: ${problem}`, 5);

  let state = standing.state;
  let others = Object.keys(tensors).filter((name) => name !== "canary.logits");
  for (const task of tasks) {
    const prefix = `${state.task + 1}.`;
    const own = others.filter((name) => name.startsWith(prefix));
    others = others.filter((name) => !name.startsWith(prefix));
    const names = own.map((name) => name.slice(prefix.length));
    const form = { encoding, projections: bundle.projections };
    state = await follow(state, task, byName(names, (name) => tensors[prefix + name]), form);
  }
  need(!others.length, `tensor ${others[0]} belongs to no task: get the packet again`);
  need(state.digest === manifest.to, "the tasks do not lead to the state named: get it again");
  const rows = live(state.classes).length;
  const shown = `${canary.count},${rows}` === `${tensors["canary.logits"].shape}`;
  need(shown, "canary.logits has no column for each class: get the packet again");

  /** @type {Version[]} */
  const versions = revisions.map((r, i) => [a + 1 + i, r]);
  const revoked = versions.some((version) => isRevoked(standing.revoked, ...version));
  need(!revoked, `packet ${t} was revoked: get a newer revision of it`, 4);
  const newest = standing.allowOlder || isAbove([revision, t], standing.highest);
  need(newest, `packet ${t} was rolled back: pass allowOlder to take it again`, 4);
  const room = bundle.capacity === 0 || state.classes.length <= bundle.capacity;
  need(room, `${state.classes.length} rows exceed ${bundle.capacity}: export a larger bundle`, 5);
  return { state, revision, versions, canary };
}

/**
 * @param {Version} a
 * @param {Version} b
 */
export const isAbove = (a, b) => a[0] > b[0] || (a[0] === b[0] && a[1] > b[1]);

/**
 * @param {any} manifest
 * @param {import("./container.js").Tensors} tensors
 */
function checkedCanary(manifest, tensors) {
  const { dtype, shape } = tensors["canary.logits"];
  const count = whole(manifest.canary.count, "the number of canary images", 16, 1);
  const seed = whole(manifest.canary.seed, "the seed", 2 ** 53 - 1);
  const kind = dtype === "float32" && shape.length === 2;
  need(kind, `canary.logits is ${dtype} ${shape}: get the packet again`);
  const logits = floats(tensors["canary.logits"]);
  const within = logits.every((x) => Math.abs(x) <= 1_000_000);
  need(within, "canary.logits holds a value out of bounds: get the packet again");
  return { seed, count, logits };
}
