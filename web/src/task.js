/** What one task does to a state: section 2 of docs/packet.md. */

import { byName, dump, sha256, unhex } from "./canonical.js";
import { need, whole } from "./check.js";
import { checkConfidence, CONFIDENCE, requireKinds } from "./confidence.js";
import { tensorsDigest } from "./container.js";
import { decoded, floats, parts } from "./encoding.js";

/** @typedef {import("./container.js").Tensor} Tensor */
/** @typedef {import("./container.js").Tensors} Tensors */
/** @typedef {import("./encoding.js").Factors} Factors */

/**
 * What packets led to. Never changed.
 *
 * @typedef {object} State
 * @property {string} digest
 * @property {number} task
 * @property {string} name Of the task.
 * @property {(string | null)[]} classes Of each row of the head; null: retired.
 * @property {(number | number[])[]} magnitudes Of each task, in units.
 * @property {number} features What the head sees.
 * @property {Float32Array} weight (rows, features)
 * @property {Float32Array} bias (rows)
 * @property {Record<string, Factors>[]} factors Of each task, by projection.
 * @property {Tensors} confidence head.temperature and head.unknown.*
 * @property {string[]} before Digests of the states that led to it.
 */

export const UNIT = 2 ** -24;
export const UNUSED = -1e30; // the bias of a row without a class
const LARGEST = 10_000;
const MOST = LARGEST / UNIT;

/** @param {(string | null)[]} classes */
export const live = (classes) => [...classes.keys()].filter((row) => classes[row] !== null);

/**
 * The state after a task.
 *
 * @param {State} state
 * @param {any} task Of the manifest.
 * @param {Tensors} own
 * @param {{encoding: string, projections: any[]}} form
 * @returns {Promise<State>}
 */
export async function follow(state, task, own, { encoding, projections }) {
  const number = state.task + 1;
  const classes = classesAfter(state.classes, task);
  const width = state.features;
  const adapted = checkTensors(own, task.classes.length, { encoding, projections, width });
  checkConfidence(own, live(classes).length, width);
  const magnitudes = added(state.magnitudes, task.deltas, number, projections.length);
  const index = /** @type {number[]} */ (Array.from(own["head.old.index"].data));
  const changeable = new Set(live(state.classes).filter((row) => !task.retired.includes(row)));
  need(ascending(index), "head.old.index does not ascend: get the packet again");
  need(index.every((row) => changeable.has(row)), "head.old.index names other rows: get it again");
  const { deltas, renamed, retired } = task;
  const tensors = await tensorsDigest(own);
  const payload = { classes: task.classes, deltas, renamed, retired, tensors };
  const head = headAfter(state, own, index, task.retired);
  return {
    digest: await sha256(unhex(state.digest), unhex(await sha256(dump(payload)))),
    task: number,
    name: task.name,
    classes,
    magnitudes,
    features: width,
    ...head,
    factors: [...state.factors, byName(adapted, (name) => decoded(own, name, encoding))],
    confidence: byName(CONFIDENCE, (name) => own[name]),
    before: [...state.before, state.digest],
  };
}

/**
 * @param {(string | null)[]} before
 * @param {any} task
 */
function classesAfter(before, { name, classes: added, retired, renamed }) {
  const classes = [...before];
  const moved = renamed.map((/** @type {any} */ pair) => pair[0]);
  for (const rows of [retired, moved]) {
    need(ascending(rows), "rows do not ascend: get the packet again");
    for (const row of rows) need(hasClass(classes, row), `row ${row} has no class: get it again`);
    for (const row of retired) classes[row] = null;
  }
  for (const [row, renaming, ...more] of renamed) {
    need(more.length === 0, "renamed holds no pairs: get the packet again");
    classes[row] = renaming;
  }
  need(Array.isArray(added), "classes is no list: get the packet again");
  classes.push(...added);
  const names = live(classes).map((row) => classes[row]);
  const given = [name, ...added, ...renamed.map((/** @type {any} */ pair) => pair[1])];
  need(given.every(isName), "a name is not allowed: get the packet again");
  need(new Set(names).size === names.length, "a class name is there twice: get the packet again");
  const some = names.length > 0 || live(before).length === 0;
  need(some, "the last class is retired: get the packet again");
  need(classes.length <= 1_000_000, `${classes.length} rows are too many: flash the device again`);
  return classes;
}

/** @param {number[]} rows */
const ascending = (rows) => rows.every((row, i) => i === 0 || rows[i - 1] < row);

/**
 * @param {(string | null)[]} classes
 * @param {any} row
 */
const hasClass = (classes, row) => Number.isInteger(row) && typeof classes[row] === "string";

/** @param {any} name */
export function isName(name) {
  const right = typeof name === "string" && name.trim() !== "" && [...name].length <= 200;
  return right && name === name.normalize("NFC") && !/[\p{Cc}\p{Cf}\p{Cs}\p{Co}/\\]/u.test(name);
}

/**
 * Magnitudes after a task.
 *
 * @param {(number | number[])[]} before
 * @param {any[]} deltas
 * @param {number} number
 * @param {number} projections
 */
function added(before, deltas, number, projections) {
  need(deltas.length === number, `${deltas.length} deltas for ${number} tasks: get it again`);
  const each = deltas.map((delta) => (Array.isArray(delta) ? delta : [delta]));
  const lists = deltas.filter(Array.isArray).length;
  const full = lists === number && each.every((row) => row.length === projections);
  const kinds = lists === 0 || full;
  const same = kinds && before.every((one) => Array.isArray(one) === lists > 0);
  need(same, "deltas are of another kind than the lineage's: get the packet again");
  return each.map((row, k) => {
    const old = k < before.length ? [before[k]].flat() : row.map(() => 0);
    const sums = row.map((delta, i) => old[i] + whole(delta, "a delta", MOST, -MOST));
    for (const sum of sums) whole(sum, "a magnitude", MOST, -MOST);
    return lists ? sums : sums[0];
  });
}

/**
 * Names, dtypes, shapes and values of a task's tensors. The projections that it adapts.
 *
 * @param {Tensors} own
 * @param {number} n Number of new classes.
 * @param {{encoding: string, projections: any[], width: number}} form
 */
function checkTensors(own, n, { encoding, projections, width }) {
  const m = own["head.old.index"].shape[0];
  const s = own["head.old.right"].shape[0];
  need(s <= 1024, `a step of rank ${s} is above 1024: get the packet again`);
  /** @type {Record<string, string>} */
  const expected = {
    "head.new.weight": `int8 ${[n, width]}`,
    "head.new.scale": `float32 ${n}`,
    "head.new.bias": `float32 ${n}`,
    "head.old.index": `int32 ${m}`,
    "head.old.left": `int8 ${[m, s]}`,
    "head.old.right": `int8 ${[s, width]}`,
    "head.old.scale": `float32 ${m}`,
    "head.old.bias": `float32 ${m}`,
  };
  const adapted = projections.filter(({ name }) => `${name}.A` in own);
  for (const { name, shape } of adapted) {
    const rank = own[`${name}.A`].shape[0];
    need(rank >= 1, `${name} has rank 0: get the packet again`);
    for (const [part, kind] of Object.entries(parts(encoding, rank, shape))) {
      expected[`${name}.${part}`] = kind;
    }
  }
  requireKinds(own, (name) => !CONFIDENCE.includes(name), expected);
  for (const [name, tensor] of Object.entries(own)) {
    if (name === "head.unknown.threshold" || !tensor.dtype.startsWith("float")) continue;
    const scale = name.endsWith(".scale");
    const [least, most] = scale ? [0, LARGEST / 128] : [-LARGEST, LARGEST];
    const within = floats(tensor).every((x) => least <= x && x <= most);
    need(within, `${name} holds a value out of bounds: get the packet again`);
  }
  return adapted.map(({ name }) => name);
}

/**
 * Head after a task. Each operation is rounded to float32.
 *
 * @param {State} state
 * @param {Tensors} own
 * @param {number[]} index
 * @param {number[]} retired
 */
function headAfter(state, own, index, retired) {
  const [known, added] = [state.bias.length, own["head.new.bias"].shape[0]];
  const width = state.features;
  const weight = new Float32Array((known + added) * width);
  const bias = new Float32Array(known + added);
  weight.set(state.weight);
  bias.set(state.bias);
  bias.set(own["head.new.bias"].data, known);
  const steps = products(own["head.old.left"], own["head.old.right"]);
  index.forEach((row, i) => {
    const scale = own["head.old.scale"].data[i];
    for (let j = 0; j < width; j++) {
      weight[row * width + j] += Math.fround(steps[i * width + j] * scale);
    }
    bias[row] = own["head.old.bias"].data[i];
  });
  const [rows, scales] = [own["head.new.weight"].data, own["head.new.scale"].data];
  rows.forEach((q, i) => {
    weight[known * width + i] = q * scales[Math.floor(i / width)];
  });
  for (const row of retired) {
    weight.fill(0, row * width, (row + 1) * width);
    bias[row] = UNUSED;
  }
  const within = weight.every((x) => Math.abs(x) <= LARGEST);
  need(within, "a weight of the head is out of bounds: get the packet again");
  return { weight, bias };
}

/**
 * left right, in integers, which float32 holds exactly.
 *
 * @param {Tensor} left
 * @param {Tensor} right
 */
function products(left, right) {
  const [[m, s], width] = [left.shape, right.shape[1]];
  const sums = new Float32Array(m * width);
  for (let i = 0; i < m; i++) {
    for (let l = 0; l < s; l++) {
      const factor = left.data[i * s + l];
      for (let j = 0; j < width; j++) sums[i * width + j] += factor * right.data[l * width + j];
    }
  }
  return sums;
}
