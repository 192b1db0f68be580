/** Where Node's tests find what they need. */

import { cp, readdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

/** @param {string} path */
const place = (path) => fileURLToPath(new URL(path, import.meta.url));

export const VECTORS = place("../../tests/vectors/");
export const FIXTURE = place("../../build/web/"); // of tests/web_fixture.py
const SRC = place("../src/");

/** @param {string} path */
export const readVectors = (path) => readFile(VECTORS + path);

/** @param {string} name */
export const loadSource = (name) => import(`../src/${name}`);

/** {name of each module: its text} */
export async function sourceTexts() {
  const names = (await readdir(SRC)).filter((name) => name.endsWith(".js"));
  const texts = names.map(async (name) => [name.slice(0, -3), await readFile(SRC + name, "utf8")]);
  return Object.fromEntries(await Promise.all(texts));
}

/**
 * Imports modules of a copy of src/ with these texts.
 *
 * @param {string} copy A new folder for it.
 * @param {Record<string, string>} sources
 */
export async function changedLoader(copy, sources) {
  await cp(SRC, join(copy, "src"), { recursive: true });
  await writeFile(join(copy, "package.json"), '{"type": "module"}');
  for (const [name, text] of Object.entries(sources)) {
    await writeFile(join(copy, "src", `${name}.js`), text);
  }
  return (/** @type {string} */ name) => import(join(copy, "src", name));
}
