/**
 * A device that takes packets in a process that ends early: `node crash.js STORE AT HOW PACKETS`.
 *
 * At write number AT it is killed. HOW is what the disk keeps of what nobody has synced: "all" (the
 * process was killed), "names" (the power was cut; what files held is lost) or "nothing" (the names
 * are lost too).
 */

import * as sync from "node:fs";
import { readFile } from "node:fs/promises";
import promises from "node:fs/promises";
import { syncBuiltinESMExports } from "node:module";
import { dirname } from "node:path";

const [, , path, at, how, ...packets] = process.argv;
let writes = 0;
/** @type {Set<string>} Files that hold what nobody has synced. */
const unsynced = new Set();
/** @type {{folder: string, undo: () => void}[]} Changes of names that nobody has synced. */
const unnamed = [];

/** What is left on the disk. */
function cut() {
  if (how !== "all") for (const file of unsynced) sync.truncateSync(file, 0);
  if (how === "nothing") for (const { undo } of unnamed.reverse()) undo();
}

/** One more write: is it the last one? */
function counted() {
  if (++writes !== Number(at)) return;
  cut();
  process.kill(process.pid, "SIGKILL");
}

/** @type {Record<string, (path: string, to: any) => (() => void)>} What undoes each change of names. */
const UNDOING = {
  open: (file) => (sync.existsSync(file) ? () => {} : () => sync.rmSync(file)),
  rename: (from, to) => () => sync.renameSync(to, from),
  link: (_, to) => () => sync.rmSync(to),
  rm: (file) => {
    const held = sync.existsSync(file) && sync.readFileSync(file);
    return () => held && sync.writeFileSync(file, held);
  },
};

for (const name of /** @type {const} */ (["open", "rename", "link", "rm"])) {
  const real = /** @type {any} */ (promises)[name];
  /** @type {any} */ (promises)[name] = async (/** @type {any[]} */ ...given) => {
    const [first, second] = given;
    const reads = name === "open" && second !== "w";
    if (reads) return watched(await real(...given), first);
    counted();
    const undo = UNDOING[name](first, second);
    const result = await real(...given);
    const changed = name === "rename" || name === "link" ? second : first;
    unnamed.push({ folder: dirname(changed), undo });
    if (name === "rename" && unsynced.delete(first)) unsynced.add(second);
    if (name === "rm") unsynced.delete(first);
    return name === "open" ? watched(result, first) : result;
  };
}
syncBuiltinESMExports();

/** Writing and syncing count too, and a write ends halfway. */
function watched(/** @type {any} */ opened, /** @type {string} */ place) {
  const [writeFile, syncFile] = [opened.writeFile.bind(opened), opened.sync.bind(opened)];
  opened.writeFile = async (/** @type {Uint8Array} */ bytes) => {
    unsynced.add(place);
    if (writes + 1 === Number(at)) await writeFile(bytes.subarray(0, bytes.length / 2));
    counted();
    await writeFile(bytes);
  };
  opened.sync = async () => {
    counted();
    await syncFile();
    unsynced.delete(place);
    const left = unnamed.filter(({ folder }) => folder !== place);
    unnamed.splice(0, unnamed.length, ...left);
  };
  return opened;
}

const { Device } = await import("../src/index.js");
const { FolderStore } = await import("../src/node.js");
const { floats } = await import("../src/encoding.js");
const { network } = await import("./vectors.js");
const device = await Device.open(new FolderStore(path), network({ floats }));
for (const packet of packets) await device.apply(await readFile(packet));
cut();
