/** What logits are worth, and whether a class is known: section 6 of docs/packet.md. */

import { need } from "./check.js";
import { floats } from "./encoding.js";

/** @typedef {import("./container.js").Tensors} Tensors */

const PARTS = ["weight", "scale", "bias", "mean", "precision", "threshold"];
export const CONFIDENCE = ["head.temperature", ...PARTS.map((part) => `head.unknown.${part}`)];
const LARGEST_LOGIT = 1_000_000;

/**
 * Refuse tensors other than these.
 *
 * @param {Tensors} own
 * @param {(name: string) => boolean} chosen Which of them are compared.
 * @param {Record<string, string>} expected {name: "dtype shape"}
 */
export function requireKinds(own, chosen, expected) {
  const names = Object.keys({ ...expected, ...own }).filter(chosen);
  for (const name of names) {
    const kind = name in own ? `${own[name].dtype} ${own[name].shape}` : "missing";
    need(kind === expected[name], `${name} is ${kind}, not ${expected[name]}: get it again`);
  }
}

/**
 * @param {Tensors} own
 * @param {number} live Number of rows with a class.
 * @param {number} width Number of features.
 */
export function checkConfidence(own, live, width) {
  const sizes = ["scale", "mean", "threshold"].map((part) => own[`head.unknown.${part}`].shape[0]);
  const [k, seen, given] = sizes;
  requireKinds(own, (name) => CONFIDENCE.includes(name), {
    "head.temperature": "float32 1",
    "head.unknown.weight": `int8 ${[k, live]}`,
    "head.unknown.scale": `float32 ${k}`,
    "head.unknown.bias": `float32 ${k}`,
    "head.unknown.mean": `float16 ${seen}`,
    "head.unknown.precision": `float16 ${seen}`,
    "head.unknown.threshold": `float32 ${given}`,
  });
  need(k <= 64, `${k} components of the unknown score are more than 64: get it again`);
  need(seen === 0 || seen === width, `head.unknown.mean has ${seen} features: get it again`);
  const precision = floats(own["head.unknown.precision"]);
  need(precision.every((x) => x >= 0), "a precision is below 0: get the packet again");
  need(given <= 1, `there are ${given} thresholds: get the packet again`);
  const threshold = floats(own["head.unknown.threshold"]);
  const within = threshold.every((x) => Math.abs(x) <= LARGEST_LOGIT);
  need(within, `the threshold ${threshold} is out of bounds: get the packet again`);
  const [temperature] = own["head.temperature"].data;
  need(temperature >= 2 ** -24, `the temperature ${temperature} is too small: get it again`);
}

/**
 * @param {Tensors} own
 * @returns {number | null} The smallest score of a known image; null: every image is known.
 */
export const thresholdOf = (own) => own["head.unknown.threshold"].data[0] ?? null;

/**
 * @param {Tensors} own Of a state.
 * @param {ArrayLike<number>} logits Of live rows.
 * @param {ArrayLike<number>} features
 */
export function answer(own, logits, features) {
  const parts = CONFIDENCE.map((name) => floats(own[name]));
  const [temperature, q, scale, bias, mean, precision] = parts;
  const z = Array.from(logits);
  const largest = z.reduce((a, b) => Math.max(a, b));
  let score = largest;
  for (let j = 0; j < scale.length; j++) {
    const inner = z.reduce((sum, logit, c) => sum + q[j * z.length + c] * logit, 0);
    score -= (scale[j] * inner + bias[j]) ** 2;
  }
  for (let f = 0; f < mean.length; f++) score -= (precision[f] * (features[f] - mean[f])) ** 2;
  const shares = z.map((logit) => Math.exp((logit - largest) / temperature[0]));
  const total = shares.reduce((sum, share) => sum + share, 0);
  return { score, probabilities: shares.map((share) => share / total) };
}
