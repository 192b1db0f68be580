/** Where Node's tests find what they need. */

import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";

/** @param {string} path */
const place = (path) => fileURLToPath(new URL(path, import.meta.url));

export const VECTORS = place("../../tests/vectors/");
export const SRC = place("../src/");
export const FIXTURE = place("../../build/web/"); // of tests/web_fixture.py

/** @param {string} path */
export const readVectors = (path) => readFile(VECTORS + path);

/** @param {string} name */
export const loadSource = (name) => import(`../src/${name}`);
