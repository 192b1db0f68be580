/**
 * Ed25519 as section 1 of docs/packet.md narrows it. WebCrypto verifies; what it accepts differs
 * between browsers for odd keys, so these are refused before.
 */

import { unhex } from "./canonical.js";

const P = 2n ** 255n - 19n;
const ORDER = 2n ** 252n + 27742317777372353535851937790883648493n;
const D = mod(-121665n * power(121666n, P - 2n));

/** @typedef {[x: bigint, y: bigint, z: bigint]} Point x / z and y / z. */

/** @type {Map<string, boolean>} A device reads the same few keys again and again. */
const known = new Map();

/**
 * Whether these are the canonical bytes of a point of the group's order.
 *
 * @param {string} key 64 hexadecimal digits.
 */
export function isKey(key) {
  const sound = known.get(key) ?? isSound(key);
  known.set(key, sound);
  return sound;
}

/** @param {string} key */
function isSound(key) {
  const bytes = unhex(key);
  const y = number(bytes) % 2n ** 255n;
  const x = root(mod((y * y - 1n) * power(D * y * y + 1n, P - 2n)));
  // a point of order L has an x, so its sign bit needs no rule; that of -x has the same order
  return x !== undefined && isCanonical(bytes) && x !== 0n && isNeutral(times(ORDER, [x, y, 1n]));
}

/**
 * Whether the second half of a signature is below the order.
 *
 * @param {Uint8Array} signature
 */
export const isScalar = (signature) => number(signature.subarray(32)) < ORDER;

/**
 * @param {string} key
 * @param {Uint8Array} signature
 * @param {Uint8Array} message
 * @returns {Promise<boolean>}
 */
export async function hasSigned(key, signature, message) {
  if (!isCanonical(signature.subarray(0, 32))) return false;
  const imported = await crypto.subtle.importKey("raw", unhex(key), "Ed25519", false, ["verify"]);
  return crypto.subtle.verify("Ed25519", imported, signature, message);
}

/** @param {Uint8Array} bytes */
function isCanonical(bytes) {
  const whole = number(bytes);
  const y = whole % 2n ** 255n;
  return y < P && (whole === y || (y !== 1n && y !== P - 1n));
}

/** @param {Uint8Array} bytes Little endian. */
const number = (bytes) =>
  BigInt(`0x${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).reverse().join("")}`);

/** @param {bigint} value */
function mod(value) {
  return ((value % P) + P) % P;
}

/**
 * @param {bigint} base
 * @param {bigint} exponent
 */
function power(base, exponent) {
  let [result, square] = [1n, mod(base)];
  for (let left = exponent; left; left >>= 1n, square = (square * square) % P) {
    if (left & 1n) result = (result * square) % P;
  }
  return result;
}

/** @param {bigint} square */
function root(square) {
  const first = power(square, (P + 3n) / 8n);
  const second = mod(first * power(2n, (P - 1n) / 4n));
  return [first, second].find((x) => mod(x * x) === square);
}

/**
 * @param {bigint} scalar
 * @param {Point} point
 */
function times(scalar, point) {
  /** @type {Point} */
  let result = [0n, 1n, 1n];
  for (const bit of scalar.toString(2)) {
    result = plus(result, result);
    if (bit === "1") result = plus(result, point);
  }
  return result;
}

/**
 * The sum of two points. The formula has no special case.
 *
 * @param {Point} p
 * @param {Point} q
 * @returns {Point}
 */
function plus(p, q) {
  const [a, c, e] = [p[2] * q[2], p[0] * q[0], p[1] * q[1]].map(mod);
  const [f, g] = [mod(a * a - D * c * e), mod(a * a + D * c * e)];
  const x = a * f * ((p[0] + p[1]) * (q[0] + q[1]) - c - e);
  return [mod(x), mod(a * g * (c + e)), mod(f * g)];
}

/** @param {Point} point */
const isNeutral = (point) => point[0] === 0n && point[1] === point[2];
