/** Inputs from a seed, by which a device proves an update: section 2 of docs/packet.md. */

import { encode } from "./canonical.js";
import { need } from "./check.js";
import { normalise } from "./image.js";
import { UNIT } from "./task.js";

const CELLS = 8;
const BYTES = CELLS * CELLS * 3;

/**
 * Images of coloured squares: float32 (count, 3, size, size).
 *
 * @param {number} seed
 * @param {number} count
 * @param {import("./image.js").Preprocessing} preprocessing
 */
export function canaryInputs(seed, count, { size, mean, std }) {
  const stream = shake256(encode(`sdlora-edge canary ${seed}`), count * BYTES);
  const inputs = new Float32Array(count * 3 * size * size);
  for (let image = 0; image < count; image++) {
    const pixels = new Uint8Array(size * size * 3);
    for (let i = 0; i < pixels.length; i++) {
      const [y, x] = [Math.floor(i / (3 * size)), Math.floor(i / 3) % size];
      const cell = CELLS * Math.floor((CELLS * y) / size) + Math.floor((CELLS * x) / size);
      pixels[i] = stream[image * BYTES + 3 * cell + (i % 3)];
    }
    inputs.set(normalise(pixels, mean, std), image * pixels.length);
  }
  return inputs;
}

/**
 * @param {number[]} logits Of live rows, computed here.
 * @param {ArrayLike<number>} expected The host's.
 * @param {number} tolerance In units.
 * @returns {number} The largest difference, relative to the largest logit (at least 1).
 */
export function checkCanary(logits, expected, tolerance) {
  const scale = Array.from(expected).reduce((most, x) => Math.max(most, Math.abs(x)), 1);
  const differences = Array.from(expected, (x, i) => Math.abs(logits[i] - x));
  const difference = differences.reduce((most, x) => Math.max(most, x), 0) / scale;
  const allowed = tolerance * UNIT;
  need(
    logits.length === expected.length && difference <= allowed, // NaN fails too
    `the canary failed: logits differ by ${difference}, more than ${allowed}; the generation ` +
      "before it stays in force: report this browser or processor",
    6,
  );
  return difference;
}

const LANE = (1n << 64n) - 1n;

/**
 * @param {bigint} lane
 * @param {bigint} by
 */
const rotated = (lane, by) => ((lane << by) | (lane >> (64n - by))) & LANE;

/**
 * SHAKE-256 (FIPS 202) of a message below 136 bytes.
 *
 * @param {Uint8Array} message
 * @param {number} length
 */
export function shake256(message, length) {
  const rate = 136;
  const block = new Uint8Array(200);
  block.set(message);
  block[message.length] ^= 0x1f;
  block[rate - 1] ^= 0x80;
  const state = Array.from(new BigUint64Array(block.buffer));
  const found = new Uint8Array(length);
  for (let end = 0; end < length; end += rate) {
    keccak(state);
    const squeezed = new Uint8Array(BigUint64Array.from(state).buffer, 0, rate);
    found.set(squeezed.subarray(0, length - end), end);
  }
  return found;
}

/** @param {bigint[]} a 25 lanes: x + 5 y. */
function keccak(a) {
  let constants = 1;
  for (let round = 0; round < 24; round++) {
    const columns = [0, 1, 2, 3, 4].map((x) => a[x] ^ a[x + 5] ^ a[x + 10] ^ a[x + 15] ^ a[x + 20]);
    for (let i = 0; i < 25; i++) a[i] ^= columns[(i + 4) % 5] ^ rotated(columns[(i + 1) % 5], 1n);
    for (let step = 0, x = 1, y = 0, lane = a[1]; step < 24; step++) {
      [x, y] = [y, (2 * x + 3 * y) % 5];
      const turned = rotated(lane, BigInt((((step + 1) * (step + 2)) / 2) % 64));
      lane = a[x + 5 * y];
      a[x + 5 * y] = turned;
    }
    for (let row = 0; row < 25; row += 5) {
      const old = a.slice(row, row + 5);
      for (let x = 0; x < 5; x++) a[row + x] ^= ~old[(x + 1) % 5] & LANE & old[(x + 2) % 5];
    }
    for (let j = 0; j < 7; j++) {
      constants = ((constants << 1) ^ ((constants >> 7) * 0x71)) % 256;
      if (constants & 2) a[0] ^= 1n << ((1n << BigInt(j)) - 1n);
    }
  }
}
