/** ONNX Runtime as the engine of a device: onnxruntime-web or onnxruntime-node. */

import { need, Refused } from "./check.js";

/** @typedef {import("./container.js").Tensor} Tensor */

/**
 * One session serves forever: an update feeds other weights.
 *
 * @param {any} ort The module onnxruntime-web or onnxruntime-node.
 * @param {object} [options] Of `InferenceSession.create`, such as {executionProviders: ["webgpu"]}.
 * @returns {import("./device.js").Engine}
 */
export function onnxEngine(ort, options = {}) {
  /** @type {WeakMap<Uint8Array, any>} */
  const sessions = new WeakMap();
  /** @type {Promise<unknown>} */
  let last = Promise.resolve();
  // int8 weights are unpacked once; else activations would be rounded to int8 as well
  const all = { logSeverityLevel: 3, extra: { session: { disable_quant_qdq: "1" } }, ...options };

  /** @param {{[name: string]: Tensor}} feeds */
  function tensors(feeds) {
    const made = Object.entries(feeds).map(([name, { dtype, shape, data }]) => {
      const halves = dtype === "float16" && "Float16Array" in globalThis;
      const values = halves ? new /** @type {any} */ (globalThis).Float16Array(data.buffer) : data;
      return [name, new ort.Tensor(dtype, values, shape)];
    });
    return Object.fromEntries(made);
  }

  return {
    async load(model, fixedFeeds) {
      const session = sessions.get(model) ?? (await opened(ort, model, all));
      sessions.set(model, session);
      for (const name of Object.keys(fixedFeeds)) {
        const taken = session.inputNames.includes(name);
        need(taken, `model.onnx has no input ${name}: export the bundle with --for web`);
      }
      return { session, fixed: tensors(fixedFeeds) };
    },
    async run({ session, fixed }, feeds) {
      const work = last.then(() => session.run({ ...fixed, ...tensors(feeds) }));
      last = work.catch(() => {}); // a session of onnxruntime-web runs once at a time
      const { logits, features } = await work;
      return { logits: logits.data, features: features?.data };
    },
  };
}

/**
 * @param {any} ort
 * @param {Uint8Array} model
 * @param {object} options
 */
async function opened(ort, model, options) {
  try {
    return await ort.InferenceSession.create(model, options);
  } catch (error) {
    const advice = "export the bundle with sdlora-edge export --for web";
    throw new Refused(`ONNX Runtime cannot load model.onnx (${error}): ${advice}`, 3, error);
  }
}
