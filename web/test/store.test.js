import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { after, before, test } from "node:test";

import { floats } from "../src/encoding.js";
import { Device, openBundle } from "../src/index.js";
import { FolderStore, folderReader } from "../src/node.js";
import { readVectors, VECTORS } from "./folders.js";
import { network } from "./vectors.js";

const CRASHING = fileURLToPath(new URL("crash.js", import.meta.url));
const PACKETS = ["1", "2", "3"].map((name) => `${VECTORS}packets/${name}.sdlora`);
let folder = "";
before(async () => (folder = await mkdtemp(join(tmpdir(), "sdlora-edge-store-"))));
after(() => rm(folder, { recursive: true }));

const open = (/** @type {string} */ path) => Device.open(new FolderStore(path), network({ floats }));

async function flashed(/** @type {string} */ name) {
  const store = new FolderStore(join(folder, name));
  await Device.init(await openBundle(folderReader(`${VECTORS}bundles/fp16`)), store);
  return store.path;
}

for (const how of ["all", "names", "nothing"]) {
  const what = how === "all" ? "a process that is killed" : `a power cut that leaves ${how} unsynced`;
  test(`${what}, at any write: the old generation or the new one`, async () => {
    const fresh = await flashed(`ends-${how}`);
    const device = await open(fresh);
    await device.apply(await readFile(PACKETS[0]));
    await device.apply(await readFile(PACKETS[1])); // so that the last update removes a record
    const [old, next] = [device.status().state, await readFile(PACKETS[2])];
    for (let at = 1, seen = new Set(); ; at++) {
      const path = join(folder, `ends-${how}-${at}`);
      await cp(fresh, path, { recursive: true });
      const words = ["--no-warnings", CRASHING, path, String(at), how, PACKETS[2]];
      const done = spawnSync(process.execPath, words);
      const found = await open(path);
      const { state, task, damage } = found.status();
      assert.equal(damage, "", `write ${at}`);
      assert.equal(state === old, task === 2);
      seen.add(task);
      if (task === 2) assert.equal((await found.apply(next)).task, 3); // and goes on from there
      if (done.signal === null) {
        assert.equal(done.status, 0, String(done.stderr));
        assert.deepEqual([task, seen.has(2)], [3, true]);
        assert.ok(at > 10, `${at} writes`);
        break;
      }
    }
  });
}

test("two processes do not write over each other", async () => {
  const path = await flashed("two");
  const [first, second] = [await open(path), await open(path)];
  await first.apply(await readFile(PACKETS[0]));
  await assert.rejects(second.apply(await readFile(PACKETS[0])), { exitCode: 8, message: /open it again/ });
  assert.equal((await open(path)).status().task, 1);
});

test("a store that exists is not made again", async () => {
  await flashed("once");
  await assert.rejects(flashed("once"), { exitCode: 2 });
});

test("a bundle of another kind of input is refused", async () => {
  const text = new TextDecoder().decode(await readVectors("bundles/fp16/manifest.json"));
  const other = text.replace('"preprocessing":{', '"preprocessing":{"kind":"text",');
  const read = async (/** @type {string} */ name) =>
    name === "manifest.json" ? new TextEncoder().encode(other) : readVectors(`bundles/fp16/${name}`);
  await assert.rejects(openBundle(read), { exitCode: 3, message: /kind text/ });
});

test("a bundle that names a file outside its folder is refused", async () => {
  const text = new TextDecoder().decode(await readVectors("bundles/fp16/manifest.json"));
  for (const name of ["../trust.json", "..", "a/../../trust.json", "..\\\\trust.json"]) {
    const asked = /** @type {string[]} */ ([]);
    const read = async (/** @type {string} */ file) => {
      asked.push(file);
      const manifest = text.replaceAll('"trust.json"', `"${name}"`);
      return file === "manifest.json" ? new TextEncoder().encode(manifest) : readVectors(`bundles/fp16/${file}`);
    };
    await assert.rejects(openBundle(read), { exitCode: 3, message: /outside the bundle/ });
    assert.ok(asked.every((file) => !file.includes("..")));
  }
});

test("a disk that cannot keep an update: exit code 8, and the old generation", async () => {
  const path = await flashed("full");
  const device = await open(path);
  await rm(join(path, "packets"), { recursive: true });
  await assert.rejects(device.apply(await readFile(PACKETS[0])), { exitCode: 8, message: /free space/ });
  assert.equal(device.status().task, 0);
  await mkdir(join(path, "packets"));
  assert.equal((await device.apply(await readFile(PACKETS[0]))).task, 1);
});

test("a damaged packet is left out, said, and repaired by applying it again", async () => {
  const path = await flashed("damaged");
  const device = await open(path);
  for (const packet of PACKETS) await device.apply(await readFile(packet));
  const digest = device.live.record.packets[1];
  const place = join(path, "packets", digest);
  for (const damage of [() => writeFile(place, "nothing"), () => rm(place)]) {
    await damage();
    const damaged = await open(path);
    assert.match(damaged.status().damage, /apply it again/);
    assert.equal(damaged.status().task, 1);
    const repaired = await damaged.apply(await readFile(PACKETS[1]));
    assert.deepEqual([repaired.task, repaired.damage], [3, ""]);
  }
});

test("a damaged record gives way to the one before it", async () => {
  const path = await flashed("record");
  const device = await open(path);
  for (const packet of PACKETS.slice(0, 2)) await device.apply(await readFile(packet));
  await writeFile(join(path, "generations", "3"), "nothing");
  assert.equal((await open(path)).status().task, 1);
});

test("a store keeps no packet that no generation needs", async () => {
  const path = await flashed("swept");
  const device = await open(path);
  for (const packet of PACKETS) await device.apply(await readFile(packet));
  for (let i = 0; i < 2; i++) await device.rollback();
  await assert.rejects(device.apply(await readFile(PACKETS[1])), { exitCode: 4, message: /allowOlder/ });
  await device.apply(await readFile(PACKETS[1]), { allowOlder: true });
  assert.deepEqual((await readdir(join(path, "packets"))).sort(), [...device.live.record.packets].sort());
  assert.equal((await readdir(join(path, "generations"))).length, 2);
  await assert.rejects(readVectors("nothing"));
});
