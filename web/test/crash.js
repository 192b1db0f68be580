/** A device that takes packets in a process that is killed: `node crash.js STORE KILL_AT`. */

import { readFile } from "node:fs/promises";
import { syncBuiltinESMExports } from "node:module";
import * as fs from "node:fs/promises";
import promises from "node:fs/promises";

const [, , path, at, ...packets] = process.argv;
let writes = 0;
for (const name of ["open", "rename", "link", "rm"]) {
  const real = promises[name];
  promises[name] = async (/** @type {any[]} */ ...given) => {
    const counts = name !== "open" || given[1] === "w";
    if (counts && ++writes === Number(at)) process.kill(process.pid, "SIGKILL");
    const result = await real(...given);
    if (counts && name === "open") cutShort(result);
    return result;
  };
}
syncBuiltinESMExports();

/** Writing and syncing count too, and a write is killed halfway. */
function cutShort(/** @type {any} */ file) {
  const [writeFile, sync] = [file.writeFile.bind(file), file.sync.bind(file)];
  file.writeFile = async (/** @type {Uint8Array} */ bytes) => {
    if (++writes === Number(at)) {
      await writeFile(bytes.subarray(0, bytes.length / 2));
      process.kill(process.pid, "SIGKILL");
    }
    await writeFile(bytes);
  };
  file.sync = async () => {
    if (++writes === Number(at)) process.kill(process.pid, "SIGKILL");
    await sync();
  };
}

const { Device } = await import("../src/index.js");
const { FolderStore } = await import("../src/node.js");
const { floats } = await import("../src/encoding.js");
const { network } = await import("./vectors.js");
const device = await Device.open(new FolderStore(path), network({ floats }));
for (const packet of packets) await device.apply(await readFile(packet));
