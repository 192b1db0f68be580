/** Where Node's tests find what they need. */

import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";

export const VECTORS = fileURLToPath(new URL("../../tests/vectors/", import.meta.url));
export const SRC = fileURLToPath(new URL("../src/", import.meta.url));

/** @param {string} path */
export const readVectors = (path) => readFile(VECTORS + path);

/** @param {string} name */
export const loadSource = (name) => import(`../src/${name}`);
