/**
 * What a device answers beside the Python device on the same bundle and packets: for Node and for
 * browsers. tests/web_fixture.py writes what is compared.
 */

/**
 * @param {(path: string) => Promise<Uint8Array>} read Of the fixture's folder.
 * @param {any} library {Device, openBundle, sha256}
 * @param {any} engine
 * @param {any} store
 * @param {string} precision
 * @returns {Promise<{logits: number, probabilities: number, merged: number, fused: number, weights: number}>}
 *   The largest differences, and how many of `weights` have the bits of Python's merge and of fused
 *   multiply-adds.
 */
export async function parity(read, { Device, openBundle, sha256 }, engine, store, precision) {
  const expected = JSON.parse(new TextDecoder().decode(await read("expected.json")));
  await Device.init(await openBundle((/** @type {string} */ name) => read(`${precision}/${name}`)), store);
  const device = await Device.open(store, engine);
  const inputs = new Float32Array(bytes(expected.inputs).buffer);
  const found = { logits: 0, probabilities: 0, merged: 0, fused: 0, weights: 0 };
  for (const [task, right] of expected.states[precision].entries()) {
    if (task) await device.apply(await read(expected.packets[task - 1]));
    if (device.status().state !== right.state) throw new Error(`task ${task}: another state`);
    const logits = await device.logits(inputs, right.logits.length);
    found.logits = Math.max(found.logits, distance(logits, right.logits.flat()));
    for (const [i, answer] of right.answers.entries()) {
      const pixels = { data: bytes(expected.images[i]), width: 24, height: 20 };
      const own = await device.predict(pixels, { top: 3 });
      const names = (/** @type {any} */ one) => one.top.map((/** @type {any} */ entry) => entry.class);
      const shares = (/** @type {any} */ one) => one.top.map((/** @type {any} */ entry) => entry.probability);
      const same = own.known === answer.known && `${names(own)}` === `${names(answer)}`;
      if (!same) throw new Error(`task ${task}, image ${i}: ${JSON.stringify([own, answer])}`);
      found.probabilities = Math.max(found.probabilities, distance(shares(own), shares(answer)));
    }
    for (const [name, digest] of Object.entries(right.fused)) {
      const own = await sha256(new Uint8Array(device.weight(name).buffer));
      found.weights += 1;
      found.fused += Number(own === digest);
      found.merged += Number(own === right.merged[name]);
    }
  }
  return found;
}

/** @param {string} text Base64. */
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

/**
 * @param {ArrayLike<number>} a
 * @param {ArrayLike<number>} b
 */
function distance(a, b) {
  if (a.length !== b.length) return Infinity;
  return Array.from(a).reduce((most, x, i) => Math.max(most, Math.abs(x - b[i])), 0);
}
