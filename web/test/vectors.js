/**
 * The test vectors of docs/packet.md (section 10), for any copy of src/: in Node and in browsers.
 *
 * @typedef {(path: string) => Promise<Uint8Array>} Read Reads a file below tests/vectors.
 * @typedef {(name: string) => Promise<any>} Load Imports a module of src/.
 */

const WITHIN = 1e-4;

/**
 * What a run of vectors needs.
 *
 * @param {Read} read
 * @param {Load} load
 */
export async function readings(read, load) {
  const index = JSON.parse(new TextDecoder().decode(await read("vectors.json")));
  const names = ["index", "container", "confidence", "encoding"];
  const library = Object.assign({}, ...(await Promise.all(names.map((name) => load(`${name}.js`)))));
  /** @type {Map<string, Promise<Uint8Array>>} */
  const known = new Map();
  /** @param {string} path */
  const cached = (path) => known.get(path) ?? known.set(path, read(path)).get(path);
  return { index, library, read: cached };
}

/**
 * The first step of a vector that goes wrong, and how; or "".
 *
 * @param {any} vector
 * @param {Awaited<ReturnType<typeof readings>>} having
 * @returns {Promise<string>}
 */
export async function wrong(vector, { index, library, read }) {
  const manifest = JSON.parse(new TextDecoder().decode(await read(`bundles/${vector.bundle}/manifest.json`)));
  if (manifest.preprocessing.kind) return refused(vector, library, read);
  const device = await flashed(`bundles/${vector.bundle}/`, library, read);
  for (const [number, step] of vector.steps.entries()) {
    const where = `${vector.name}, step ${number + 1} (${step.packet ?? "rollback"})`;
    const code = await exitCode(library, async () => {
      if (step.packet) await device.apply(await read(`packets/${step.packet}.sdlora`));
      else await device.rollback();
    });
    if (code !== step.exit) return `${where}: exit code ${code}, not ${step.exit}`;
    if (code && step !== vector.steps.at(-1)) continue; // what it has changed is seen later
    const problem = await difference(device, library, { ...index.states[step.state], ...step });
    if (problem) return `${where}: ${problem}`;
  }
  return "";
}

/**
 * A model that reads something other than images must be refused when its bundle is opened.
 *
 * @param {any} vector
 * @param {any} library
 * @param {(path: string) => any} read
 */
async function refused(vector, library, read) {
  const code = await exitCode(library, async () => {
    await flashed(`bundles/${vector.bundle}/`, library, read);
  });
  return code === 3 ? "" : `${vector.name}: the bundle ends with exit code ${code}, not 3`;
}

/**
 * A device of a bundle, with the vectors' own model as its engine.
 *
 * @param {string} folder
 * @param {any} library
 * @param {(path: string) => any} read
 */
export async function flashed(folder, library, read) {
  const store = new MemoryStore();
  await library.Device.init(await library.openBundle((name) => read(folder + name)), store);
  return library.Device.open(store, network(library));
}

/**
 * @param {any} library
 * @param {() => Promise<void>} work
 */
async function exitCode(library, work) {
  try {
    await work();
    return 0;
  } catch (error) {
    return error instanceof library.Refused ? error.exitCode : `1 (${error})`;
  }
}

/**
 * How a device differs from what a state should be.
 *
 * @param {any} device
 * @param {any} library
 * @param {any} expected
 */
async function difference(device, library, expected) {
  const { state } = device.live;
  const { tensorsDigest, answer, floats, stored, thresholdOf } = library;
  const [rows, features] = [state.bias.length, state.features];
  const found = {
    state: device.status().state,
    trust_version: device.status().trust_version,
    classes: state.classes,
    head: await tensorsDigest({
      "head.bias": float32(state.bias, [rows]),
      "head.weight": float32(state.weight, [rows, features]),
    }),
    factors: await tensorsDigest(factors(state, device.bundle.manifest.projections)),
  };
  for (const [name, value] of Object.entries(found)) {
    const same = JSON.stringify(value) === JSON.stringify(expected[name]);
    if (!same) return `${name} is ${JSON.stringify(value)}, not ${JSON.stringify(expected[name])}`;
  }
  for (const [name, right] of Object.entries(expected.weights)) {
    const { dtype, shape } = device.bundle.manifest.weights[name];
    const data = floats({ dtype, shape, data: stored(device.weight(name), dtype) });
    const sums = fingerprint(data, shape[1]);
    if (!near(sums, right)) return `${name} has ${sums}, not ${right}`;
  }
  for (const right of expected.answers) {
    const { score, probabilities } = answer(state.confidence, right.logits, right.features);
    const least = thresholdOf(state.confidence);
    const same = near([score], [right.score]) && near(probabilities, right.probabilities);
    const known = least === null || score >= least;
    if (!same || known !== right.known) return `${right.logits} are worth ${score} ${known}`;
  }
  return "";
}

/**
 * @param {Float32Array} data
 * @param {number[]} shape
 */
const float32 = (data, shape) => ({ dtype: "float32", shape, data });

/**
 * @param {any} state
 * @param {any[]} projections
 */
function factors(state, projections) {
  const found = state.factors.flatMap((/** @type {any} */ task, /** @type {number} */ k) =>
    Object.entries(task).flatMap(([name, { rank, A, B }]) => {
      const [rows, columns] = projections.find((p) => p.name === name).shape;
      const named = { A: float32(A, [rank, columns]), B: float32(B, [rows, rank]) };
      return Object.entries(named).map(([part, x]) => [`${k + 1}.${name}.${part}`, x]);
    }),
  );
  return Object.fromEntries(found);
}

/**
 * @param {Float32Array} weight
 * @param {number} columns
 */
function fingerprint(weight, columns) {
  let [sum, other] = [0, 0];
  weight.forEach((w, i) => {
    sum += w;
    other += w * (((3 * Math.floor(i / columns) + 5 * (i % columns)) % 7) - 3);
  });
  return [sum, other];
}

/**
 * @param {number[]} found
 * @param {number[]} right
 */
const near = (found, right) =>
  found.length === right.length && found.every((x, i) => Math.abs(x - right[i]) <= WITHIN);

/**
 * The model of the vectors, as an engine.
 *
 * @param {any} library
 */
export function network({ floats }) {
  return {
    async load(/** @type {Uint8Array} */ _, /** @type {any} */ fixed) {
      const made = Object.entries(fixed).map(([name, x]) => [name, { ...x, data: floats(x) }]);
      return Object.fromEntries(made);
    },
    async run(/** @type {any} */ weights, /** @type {any} */ { pictures: { shape, data } }) {
      const outputs = { logits: /** @type {number[]} */ ([]), features: /** @type {number[]} */ ([]) };
      for (let i = 0; i < shape[0]; i++) {
        const x = data.subarray((i * data.length) / shape[0], ((i + 1) * data.length) / shape[0]);
        const hidden = product(weights["mix.weight"], x).map((value) => Math.max(0, value));
        const features = product(weights["qkv.weight"], hidden).map((value) => Math.max(0, value));
        const bias = weights["head.bias"].data;
        outputs.logits.push(...product(weights["head.weight"], features).map((z, row) => z + bias[row]));
        outputs.features.push(...features);
      }
      return { logits: Float32Array.from(outputs.logits), features: Float32Array.from(outputs.features) };
    },
  };
}

/**
 * @param {{shape: number[], data: Float32Array}} matrix
 * @param {ArrayLike<number>} x
 */
function product({ shape: [rows, columns], data }, x) {
  return Float32Array.from({ length: rows }, (_, row) => {
    let sum = 0;
    for (let j = 0; j < columns; j++) sum += data[row * columns + j] * x[j];
    return sum;
  });
}

/** A store that is gone with the process. */
export class MemoryStore {
  /** @type {Map<string, any>} */
  #kept = new Map();

  /**
   * @param {{[name: string]: Uint8Array}} files
   * @param {any} record
   */
  async create(files, record) {
    for (const [name, bytes] of Object.entries(files)) this.#kept.set(`bundle/${name}`, bytes);
    this.#kept.set("record", record);
  }

  /** @param {string} name */
  file = async (name) => this.#kept.get(`bundle/${name}`);

  /** @param {string} digest */
  packet = async (digest) => this.#kept.get(`packets/${digest}`);

  record = async () => this.#kept.get("record");

  /**
   * @param {any} record
   * @param {[string, Uint8Array]} [packet]
   */
  async commit(record, packet) {
    if (packet) this.#kept.set(`packets/${packet[0]}`, packet[1]);
    this.#kept.set("record", record);
  }
}
