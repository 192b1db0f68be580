/**
 * What tests/bench/web.py writes into docs/figures/web.json: `node bench.js BUNDLE ROUNDS`.
 *
 * Latency: of one image, one thread, onnxruntime-node and onnxruntime-web in turn, so that what slows
 * the machine down slows both.
 */

import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

import * as native from "onnxruntime-node";
import * as wasm from "onnxruntime-web";

import { sha256 } from "../src/canonical.js";
import { Device, onnxEngine, openBundle } from "../src/index.js";
import { folderReader } from "../src/node.js";
import { changedLoader, FIXTURE, loadSource, readVectors, sourceTexts } from "./folders.js";
import { parity } from "./parity.js";
import { failure, sabotages } from "./sabotages.js";
import { MemoryStore, readings, wrong } from "./vectors.js";

wasm.env.wasm.numThreads = 1;
const ENGINES = {
  native: () => onnxEngine(native, { intraOpNumThreads: 1 }),
  wasm: () => onnxEngine(wasm),
};
const [, , bundle, rounds] = process.argv;

async function vectors() {
  const having = await readings(readVectors, loadSource);
  let passed = 0;
  for (const vector of having.index.vectors) passed += Number(!(await wrong(vector, having)));
  return { vectors_passed: passed, vectors: having.index.vectors.length };
}

async function sabotaged() {
  const all = sabotages(await sourceTexts());
  const folder = await mkdtemp(join(tmpdir(), "sdlora-edge-bench-"));
  let caught = 0;
  for (const [number, { sources }] of all.entries()) {
    const load = await changedLoader(join(folder, String(number)), sources);
    caught += Number((await failure(await readings(readVectors, load))) !== "");
  }
  await rm(folder, { recursive: true });
  return { sabotages_caught: caught, sabotages: all.length };
}

async function difference() {
  const read = (/** @type {string} */ path) => readFile(FIXTURE + path);
  const library = { Device, openBundle, sha256 };
  let most = 0;
  for (const engine of Object.values(ENGINES)) {
    const { logits } = await parity(read, library, engine(), new MemoryStore(), "fp32");
    most = Math.max(most, logits);
  }
  return { max_logit_difference: most };
}

async function latency() {
  const opened = await openBundle(folderReader(bundle));
  const { size } = opened.manifest.preprocessing;
  const input = Float32Array.from({ length: 3 * size * size }, (_, i) => Math.sin(i));
  /** @type {Record<string, Device>} */
  const devices = {};
  for (const [name, engine] of Object.entries(ENGINES)) {
    const store = new MemoryStore();
    await Device.init(opened, store);
    devices[name] = await Device.open(store, engine());
    for (let i = 0; i < 3; i++) await devices[name].logits(input, 1);
  }
  /** @type {Record<string, number[]>} */
  const times = { native: [], wasm: [] };
  for (let round = 0; round < Number(rounds); round++) {
    const names = round % 2 ? ["native", "wasm"] : ["wasm", "native"];
    for (const name of names) {
      const begin = performance.now();
      await devices[name].logits(input, 1);
      times[name].push(performance.now() - begin);
    }
  }
  const ratios = times.wasm.map((ms, i) => ms / times.native[i]);
  return { wasm_over_native: median(ratios), wasm_ms: median(times.wasm), native_ms: median(times.native) };
}

/** @param {number[]} values */
const median = (values) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)];

const parts = [latency, vectors, difference, sabotaged];
const figures = {};
for (const part of parts) Object.assign(figures, await part());
console.log(JSON.stringify(figures));
