import assert from "node:assert/strict";
import { cp, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";

import { loadSource, readVectors, SRC } from "./folders.js";
import { failure, sabotages } from "./sabotages.js";
import { readings } from "./vectors.js";

const folder = await mkdtemp(join(tmpdir(), "sdlora-edge-sabotages-"));
after(() => rm(folder, { recursive: true }));
const names = (await readdir(SRC)).filter((name) => name.endsWith(".js"));
const texts = names.map(async (name) => [name.slice(0, -3), await readFile(SRC + name, "utf8")]);
const sources = Object.fromEntries(await Promise.all(texts));

test("the reader as it is fails no vector", async () => {
  assert.equal(await failure(await readings(readVectors, loadSource)), "");
});

for (const [number, { about, sources: changed }] of sabotages(sources).entries()) {
  test(about, async () => {
    const copy = join(folder, String(number));
    await cp(SRC, copy, { recursive: true });
    await writeFile(join(folder, "package.json"), '{"type": "module"}');
    for (const [name, text] of Object.entries(changed)) {
      if (text !== sources[name]) await writeFile(join(copy, `${name}.js`), text);
    }
    const having = await readings(readVectors, (name) => import(join(copy, name)));
    assert.notEqual(await failure(having), "", "no vector fails");
  });
}
