/**
 * A device of sdlora-edge in JavaScript, for Node and for browsers: a second implementation of
 * docs/packet.md. It has no dependency but the engine that the caller passes.
 *
 *     import { Device, onnxEngine, openBundle } from "sdlora-edge";
 *     import { IndexedDbStore, urlReader } from "sdlora-edge/browser";
 *
 *     const store = new IndexedDbStore("camera"); // Node: FolderStore of "sdlora-edge/node"
 *     await Device.init(await openBundle(urlReader("bundle/")), store); // once
 *     const device = await Device.open(store, onnxEngine(ort));
 *     await device.apply(bytes); // a packet: Uint8Array
 *     await device.predict(canvas.getImageData(0, 0, width, height)); // {known, top, ...}
 */

export { openBundle } from "./bundle.js";
export { Refused } from "./check.js";
export { Device } from "./device.js";
export { onnxEngine } from "./engine.js";
