/** The bundle that a device is flashed with: section 6 of docs/packet.md. */

import { byName, parse, sha256 } from "./canonical.js";
import { need, reading } from "./check.js";
import { checkConfidence, CONFIDENCE } from "./confidence.js";
import { safetensors } from "./container.js";
import { checkedTrust } from "./control.js";
import { decoded, floats } from "./encoding.js";
import { live } from "./task.js";

const FORMAT = "sdlora-edge/bundle/4";
const MODEL = "model.onnx";

/**
 * @typedef {object} Bundle
 * @property {string} id SHA-256 of manifest.json.
 * @property {any} manifest
 * @property {import("./container.js").Trust} trust The keys in force at first.
 * @property {Record<string, Float32Array>} weights W_e, without the head.
 * @property {import("./task.js").State} state
 * @property {{seed: number, count: number, logits: Float32Array}} canary
 * @property {Uint8Array} model
 * @property {Record<string, Uint8Array>} files Every file.
 */

/**
 * Read a bundle. Every file is compared with the manifest.
 *
 * @param {(name: string) => Promise<Uint8Array>} read Of a file of the bundle.
 * @returns {Promise<Bundle>}
 * @throws {Refused} A file is damaged, or of another format.
 */
export async function openBundle(read) {
  return reading(async () => {
    const written = await read("manifest.json");
    const manifest = parse(written);
    const { format, target } = manifest;
    need(format === FORMAT, `format ${format} is not ${FORMAT}: export the bundle again`);
    need(target === "onnx", `target ${target} does not run in JavaScript: export with --for web`);
    const { kind = "image" } = manifest.preprocessing;
    need(kind === "image", `inputs of kind ${kind} are not known in JavaScript: use a Python device`);
    /** @type {Record<string, Uint8Array>} */
    const files = Object.assign(Object.create(null), { "manifest.json": written });
    for (const [name, { sha256: digest, size }] of Object.entries(manifest.files)) {
      need(/^(?!\.\.?$)[^/\\]+$/.test(name), `${name} lies outside the bundle: get the bundle again`);
      const bytes = await read(name);
      const same = bytes.length === size && (await sha256(bytes)) === digest;
      need(same, `${name} is not the file that the manifest names: get the bundle again`);
      files[name] = bytes;
    }
    const stored = safetensors(files["factors.safetensors"]);
    const named = Object.keys(manifest.weights);
    const weights = byName(named, (name) => floats(weightOf(manifest.weights[name], files)));
    const { "head.weight": head, "head.bias": bias, ...adapted } = weights;
    const { classes } = parse(files["classes.json"]);
    const features = manifest.weights["head.weight"].shape[1];
    checkConfidence(stored, live(classes).length, features);
    const before = manifest.states.slice(0, -1);
    /** @type {import("./task.js").State} */
    const state = {
      digest: manifest.states.at(-1),
      task: before.length,
      name: manifest.task_name,
      classes,
      magnitudes: manifest.magnitudes,
      features,
      weight: head.slice(0, classes.length * features),
      bias: bias.slice(0, classes.length),
      factors: [...before.keys()].map((k) => factorsOf(manifest, stored, k + 1)),
      confidence: byName(CONFIDENCE, (name) => stored[name]),
      before,
    };
    const canary = { ...manifest.canary, logits: floats(stored["canary.logits"]) };
    const trust = await checkedTrust(parse(files["trust.json"]));
    const id = await sha256(written);
    return { id, manifest, trust, weights: adapted, state, canary, model: files[MODEL], files };
  });
}

/**
 * @param {{file: string, offset: number, dtype: string, shape: number[]}} place
 * @param {Record<string, Uint8Array>} files
 */
function weightOf({ file, offset, dtype, shape }, files) {
  const array = dtype === "float16" ? Uint16Array : Float32Array;
  const length = shape.reduce((a, b) => a * b, array.BYTES_PER_ELEMENT);
  const bytes = new Uint8Array(files[file].subarray(offset, offset + length)); // a copy is aligned
  return { dtype, shape, data: new array(bytes.buffer) };
}

/**
 * The factors of a task of the bundle.
 *
 * @param {any} manifest
 * @param {import("./container.js").Tensors} stored
 * @param {number} task
 */
function factorsOf({ encoding, projections }, stored, task) {
  const own = projections.filter((/** @type {any} */ p) => `${task}.${p.name}.A` in stored);
  const names = own.map((/** @type {any} */ p) => p.name);
  return byName(names, (name) => decoded(stored, `${task}.${name}`, encoding));
}
