/**
 * What a device says to packets: `node outcomes.js < JOB`, for tests/web/test_web_mutations.py.
 *
 * JOB is {"bundle": name of a vectors' bundle, "trust": the keys in force, "packets": [base64]}. It
 * prints [[exit code, state], ...]: each packet comes to a device that is as flashed.
 */

import { text } from "node:stream/consumers";

import { Refused } from "../src/index.js";
import { loadSource, readVectors } from "./folders.js";
import { flashed, readings } from "./vectors.js";

const { bundle, trust, packets } = JSON.parse(await text(process.stdin));
const { library, read } = await readings(readVectors, loadSource);
const device = await flashed(`bundles/${bundle}/`, library, read);
const fresh = { ...device.live, trust };
const own = () => [Object, Function].flatMap((kind) => [kind, kind.prototype]).flatMap(Object.keys);
const outcomes = [];
for (const packet of packets) {
  device.live = fresh;
  const code = await device.apply(new Uint8Array(Buffer.from(packet, "base64"))).then(
    () => 0,
    (error) => (error instanceof Refused ? error.exitCode : String(error.stack)),
  );
  outcomes.push([own().length ? `${own()} was changed` : code, device.status().state]);
}
console.log(JSON.stringify(outcomes));
