import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";

import * as native from "onnxruntime-node";
import * as wasm from "onnxruntime-web";

import { sha256 } from "../src/canonical.js";
import { Device, onnxEngine, openBundle } from "../src/index.js";
import { folderReader } from "../src/node.js";
import { FIXTURE, readVectors } from "./folders.js";
import { parity } from "./parity.js";
import { MemoryStore } from "./vectors.js";

wasm.env.wasm.numThreads = 1;
const BOUNDS = { fp32: 1e-4, fp16: 1e-2, int8: 1e-2 }; // half precision rounds in another order

for (const [runtime, ort] of Object.entries({ native, wasm })) {
  for (const [precision, bound] of Object.entries(BOUNDS)) {
    test(`${runtime}, ${precision}: logits and answers are those of Python`, async (context) => {
      const read = (/** @type {string} */ path) => readFile(FIXTURE + path);
      const library = { Device, openBundle, sha256 };
      const store = new MemoryStore();
      const found = await parity(read, library, onnxEngine(ort), store, precision);
      context.diagnostic(JSON.stringify({ runtime, precision, ...found }));
      assert.ok(found.logits <= bound && found.probabilities <= bound, JSON.stringify(found));
      assert.equal(found.fused, found.weights, "merged weights are fused multiply-adds, to the bit");
    });
  }
}

test("a bundle whose weights are inputs with defaults is refused by name", async () => {
  const store = new MemoryStore();
  const bundle = await openBundle((name) => readVectors(`bundles/fp32/${name}`));
  await Device.init(bundle, store);
  const opened = Device.open(store, onnxEngine(native));
  await assert.rejects(opened, { exitCode: 3, message: /export --for web/ });
});

test("a file of a bundle that was changed is refused by name", async () => {
  const read = folderReader(`${FIXTURE}fp32`);
  const changed = async (/** @type {string} */ name) =>
    name === "classes.json" ? new TextEncoder().encode("{}") : read(name);
  await assert.rejects(openBundle(changed), { exitCode: 3, message: /classes\.json/ });
});
