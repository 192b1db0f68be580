import assert from "node:assert/strict";
import { test } from "node:test";

import { parse, unbase64 } from "../src/canonical.js";
import { reading } from "../src/check.js";

test("nobody's JSON takes more than linear time", () => {
  const begin = Date.now();
  for (const text of ['{"a":' + '\\"'.repeat(2 ** 16), "[".repeat(2 ** 20), '{"a":'.repeat(2 ** 17)]) {
    assert.throws(() => parse(new TextEncoder().encode(text)), SyntaxError);
  }
  assert.ok(Date.now() - begin < 3000, "it took 6 s when it was quadratic");
});

test("a browser without Ed25519 does not blame the file", async () => {
  const error = new DOMException("no Ed25519", "NotSupportedError");
  await assert.rejects(reading(() => Promise.reject(error)), error);
  await assert.rejects(reading(async () => unbase64("?")), { exitCode: 3 });
});
