import assert from "node:assert/strict";
import { test } from "node:test";

import { loadSource, readVectors } from "./folders.js";
import { readings, wrong } from "./vectors.js";

const having = await readings(readVectors, loadSource);

for (const vector of having.index.vectors) {
  test(vector.about, async () => assert.equal(await wrong(vector, having), ""));
}
