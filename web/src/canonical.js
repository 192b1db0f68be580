/** Canonical JSON, base64, hexadecimal digits and digests: "Words" of docs/packet.md. */

import { need } from "./check.js";

const DEPTH = 16;
const TOKENS = /"[^"\\]*(?:\\.[^"\\]*)*"|[[\]{}:]|[-+.\w]+/gs;

/** @param {string} text */
export function encode(text) {
  if (typeof text !== "string") throw new TypeError(`${text} is not a text`);
  return new TextEncoder().encode(text);
}

/**
 * Parse an object: every number is a safe integer, no key is there twice.
 *
 * @param {Uint8Array} bytes
 * @returns {any}
 */
export function parse(bytes) {
  const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  const value = JSON.parse(text); // first: only in sound JSON are tokens found in linear time
  let [depth, pairs] = [0, 0];
  for (const [token] of text.matchAll(TOKENS)) {
    if (token === "{" || token === "[") need(++depth <= DEPTH, "JSON is too deep: get it again");
    else if (token === "}" || token === "]") depth--;
    else if (token === ":") pairs++;
    else if (/^[-\d]/.test(token)) exact(token);
  }
  need(keys(value) === pairs, "JSON has a key twice: get it again");
  return value;
}

/** @param {string} token */
function exact(token) {
  const right = /^-?\d+$/.test(token) && Number.isSafeInteger(Number(token));
  need(right, `${token} is not an integer up to 2^53 - 1: get it again`);
}

/**
 * How many keys all its objects have.
 *
 * @param {any} value
 * @returns {number}
 */
function keys(value) {
  if (value === null || typeof value !== "object") return 0;
  const inside = Object.values(value).reduce((sum, one) => sum + keys(one), 0);
  return inside + (Array.isArray(value) ? 0 : Object.keys(value).length);
}

/**
 * Write canonical JSON.
 *
 * @param {any} value
 * @returns {string}
 */
export function dump(value) {
  if (Array.isArray(value)) return `[${value.map(dump)}]`;
  if (value !== null && typeof value === "object") {
    return `{${sorted(Object.keys(value)).map((key) => `${dump(key)}:${dump(value[key])}`)}}`;
  }
  return JSON.stringify(value).replace(/[\x7f-\uffff]/g, escaped);
}

/** @param {string} unit */
const escaped = (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`;

/**
 * By code point. JavaScript's own order, by 16-bit units, differs above U+FFFF.
 *
 * @param {string[]} names
 */
export function sorted(names) {
  if (!/[\ud800-\udfff]/.test(names.join(""))) return names.toSorted();
  /** @param {string} name */
  const points = (name) =>
    Array.from(name, (c) => Number(c.codePointAt(0)).toString(16).padStart(6, "0")).join();
  return [...names].sort((a, b) => (points(a) < points(b) ? -1 : 1));
}

/**
 * @param {string} text
 * @returns {Uint8Array}
 */
export function unbase64(text) {
  const raw = atob(text);
  need(btoa(raw) === text, "base64 is not canonical: get the packet again");
  return Uint8Array.from(raw, (c) => c.charCodeAt(0));
}

/** @param {any} text */
export const isHex = (text) => typeof text === "string" && /^[0-9a-f]{64}$/.test(text);

/** @param {string} text */
export const unhex = (text) =>
  Uint8Array.from(text.match(/../g) ?? [], (pair) => Number.parseInt(pair, 16));

/**
 * SHA-256 in hexadecimal digits.
 *
 * @param {...(Uint8Array | string)} parts
 */
export async function sha256(...parts) {
  const bytes = concat(parts.map((part) => (typeof part === "string" ? encode(part) : part)));
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * @param {Uint8Array[]} parts
 * @returns {Uint8Array}
 */
export function concat(parts) {
  if (parts.length === 1) return parts[0];
  const all = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let end = 0;
  for (const part of parts) {
    all.set(part, end);
    end += part.length;
  }
  return all;
}

/**
 * An object without a prototype: any name is a name.
 *
 * @template T
 * @param {string[]} names
 * @param {(name: string) => T} value
 * @returns {Record<string, T>}
 */
export function byName(names, value) {
  const found = Object.create(null);
  for (const name of names) found[name] = value(name);
  return found;
}
