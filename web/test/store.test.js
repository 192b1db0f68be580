import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { cp, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
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

test("a process that is killed at any write leaves the old generation or the new one", async () => {
  const fresh = await flashed("killed");
  const device = await open(fresh);
  await device.apply(await readFile(PACKETS[0]));
  const [old, next] = [device.status().state, await readFile(PACKETS[1])];
  for (let at = 1, seen = new Set(); ; at++) {
    const path = join(folder, `killed-${at}`);
    await cp(fresh, path, { recursive: true });
    const done = spawnSync(process.execPath, ["--no-warnings", CRASHING, path, String(at), PACKETS[1]]);
    const found = await open(path);
    const { state, task, damage } = found.status();
    assert.equal(damage, "");
    assert.equal(state === old, task === 1);
    seen.add(task);
    if (task === 1) assert.equal((await found.apply(next)).task, 2); // and goes on from there
    if (done.signal === null) {
      assert.equal(done.status, 0, String(done.stderr));
      assert.deepEqual([...seen].sort(), [1, 2]);
      assert.ok(at > 8, `${at} writes`);
      return;
    }
  }
});

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
