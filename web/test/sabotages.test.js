import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";

import { changedLoader, loadSource, readVectors, sourceTexts } from "./folders.js";
import { failure, sabotages } from "./sabotages.js";
import { readings } from "./vectors.js";

const folder = await mkdtemp(join(tmpdir(), "sdlora-edge-sabotages-"));
after(() => rm(folder, { recursive: true }));

test("the reader as it is fails no vector", async () => {
  assert.equal(await failure(await readings(readVectors, loadSource)), "");
});

for (const [number, { about, sources }] of sabotages(await sourceTexts()).entries()) {
  test(about, async () => {
    const load = await changedLoader(join(folder, String(number)), sources);
    assert.notEqual(await failure(await readings(readVectors, load)), "", "no vector fails");
  });
}
