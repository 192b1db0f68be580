/**
 * A device of sdlora-edge in JavaScript, for Node and for browsers: a second implementation of
 * docs/packet.md. It has no dependency but the engine that the caller passes.
 *
 *     import { Device, openBundle } from "sdlora-edge";
 *     import { IndexedDbStore, webEngine } from "sdlora-edge/browser";   // or FolderStore, nodeEngine
 *
 *     const store = new IndexedDbStore("camera");                        // from "sdlora-edge/node"
 *     const engine = webEngine(ort);
 *     const device = await Device.init(await openBundle(read), store, engine);
 *     const device = await Device.open(store, engine);                   // any later time
 *     await device.apply(bytes);                                         // a packet: Uint8Array
 *     await device.predict(canvas.getImageData(0, 0, width, height));    // {known, top, ...}
 */

export { openBundle } from "./bundle.js";
export { Refused } from "./check.js";
export { Device } from "./device.js";
export { onnxEngine } from "./engine.js";
