/** A device: its bundle, the packets it holds, and the generation that it serves. */

import { accepted, isAbove } from "./accept.js";
import { openBundle } from "./bundle.js";
import { sha256 } from "./canonical.js";
import { canaryInputs, checkCanary } from "./canary.js";
import { need, reading, Refused } from "./check.js";
import { answer, thresholdOf } from "./confidence.js";
import { openPacket } from "./container.js";
import { covers, revocation, rotated, withRevoked } from "./control.js";
import { stored } from "./encoding.js";
import { prepare, normalise } from "./image.js";
import { merged } from "./merge.js";
import { live as liveRows, UNUSED } from "./task.js";

/** @typedef {import("./container.js").Tensor} Tensor */
/** @typedef {import("./container.js").Trust} Trust */
/** @typedef {import("./control.js").Version} Version */

/**
 * @typedef {object} Record What a store keeps beside the bundle and the packets.
 * @property {number} counter Number of the generation.
 * @property {string} bundle Id of the bundle.
 * @property {string[]} packets Digests of the updates, in order.
 * @property {[digest: string, place: number][]} trust Packets of keys, each with the number of
 *   updates that came before it.
 * @property {Version[]} revoked
 * @property {Version} highest The highest (revision, task) ever confirmed; revision first.
 *
 * @typedef {object} Store Keeps a device. Any crash leaves the old record in force, or the new one.
 * @property {(files: {[name: string]: Uint8Array}, record: Record) => Promise<void>} create
 * @property {(name: string) => Promise<Uint8Array>} file Of the bundle.
 * @property {(digest: string) => Promise<Uint8Array>} packet
 * @property {() => Promise<Record>} record The one in force.
 * @property {(record: Record, packet?: Packet) => Promise<void>} commit
 *   Put a record in force whose counter is one above the one in force, else refuse.
 *
 * @typedef {[digest: string, bytes: Uint8Array]} Packet
 *
 * @typedef {object} Outputs Of one or more images, row by row.
 * @property {Float32Array} logits
 * @property {Float32Array} [features]
 *
 * @typedef {object} Engine What runs the model.
 * @property {(model: Uint8Array, fixedFeeds: {[name: string]: Tensor}) => Promise<any>} load
 *   What `run` takes. Earlier results stay valid.
 * @property {(loaded: any, feeds: {[name: string]: Tensor}) => Promise<Outputs>} run
 *
 * @typedef {object} Live A generation that is served. Never changed.
 * @property {Record} record
 * @property {string[]} served Digests of its packets, of tasks and of keys.
 * @property {Version[][]} versions Of each update.
 * @property {import("./task.js").State} state
 * @property {number} revision
 * @property {Trust} trust The keys in force.
 * @property {{seed: number, count: number, logits: Float32Array}} canary
 * @property {any} loaded The engine's.
 * @property {string} damage Why it is less than the record says.
 */

/** @type {Trust} Nothing is accepted. */
const NOBODY = { version: 0, threshold: 1, keys: {} };

export class Device {
  /** @type {Promise<unknown>} */
  #last = Promise.resolve();

  /**
   * @param {Store} store
   * @param {Engine} engine
   * @param {import("./bundle.js").Bundle} bundle
   */
  constructor(store, engine, bundle) {
    this.store = store;
    this.engine = engine;
    this.bundle = bundle;
    this.live = /** @type {Live} */ ({});
  }

  /**
   * Make a store of a bundle.
   *
   * @param {import("./bundle.js").Bundle} bundle
   * @param {Store} store
   */
  static async init(bundle, store) {
    const { task } = bundle.state;
    const highest = /** @type {Version} */ ([bundle.manifest.revisions.at(-1) ?? 0, task]);
    const record = { counter: 1, bundle: bundle.id, packets: [], trust: [], revoked: [], highest };
    await store.create(bundle.files, record);
  }

  /**
   * Open a store. What is damaged is left out: `status()` says so.
   *
   * @param {Store} store
   * @param {Engine} engine
   * @throws {Refused} Not even the bundle can be served.
   */
  static async open(store, engine) {
    const record = await store.record();
    const bundle = await openBundle((name) => store.file(name));
    need(bundle.id === record.bundle, "the bundle is not the one of this store: flash it again");
    const device = new Device(store, engine, bundle);
    device.live = await device.#longest(record);
    return device;
  }

  /**
   * Verify a packet, build the new weights, run the canary, commit, and serve it.
   *
   * @param {Uint8Array} packet
   * @param {{allowOlder?: boolean}} [options] allowOlder: take a packet again that was rolled back.
   * @returns {Promise<ReturnType<Device["status"]>>}
   * @throws {Refused} Nothing has changed. `exitCode` says why.
   */
  apply(packet, { allowOlder = false } = {}) {
    return this.#alone(async () => {
      const digest = await sha256(packet);
      const { record, served, trust } = this.live;
      need(!served.includes(digest), "this packet is applied already", 7);
      const named = [...record.packets, ...record.trust.map(([name]) => name)];
      if (named.includes(digest)) {
        await this.#commit(record, async () => this.live, [digest, packet]); // a repair
        this.live = await this.#longest(this.live.record);
        return;
      }
      const opened = await reading(() => openPacket(packet, trust));
      const { kind } = opened.manifest;
      if (kind === "update") return this.#update(opened, [digest, packet], allowOlder);
      need(!Object.keys(opened.tensors).length, "a control packet has tensors: get it again");
      if (kind === "trust") return this.#rotate(opened, [digest, packet]);
      need(kind === "revocation", `kind ${kind} is not known: update this program`);
      await this.#revoke(opened.manifest);
    });
  }

  /** Take the newest update back. */
  rollback() {
    return this.#alone(async () => {
      const { packets } = this.live.record;
      need(packets.length, "there is no update to roll back", 7);
      await this.#rebuild(without(this.live.record, packets.length - 1));
    });
  }

  /** Where the device stands. */
  status() {
    const { record, state, revision, trust, damage } = this.live;
    const { manifest, id } = this.bundle;
    return {
      generation: damage ? 0 : record.counter,
      task: state.task,
      task_name: state.name,
      revision,
      state: state.digest,
      lineage: manifest.states[0],
      bundle: id,
      model: manifest.model,
      trust_version: trust.version,
      classes: state.classes.filter((name) => name !== null),
      temperature: state.confidence["head.temperature"].data[0],
      threshold: thresholdOf(state.confidence),
      packets: record.packets.length,
      damage,
    };
  }

  /**
   * Name the class of an image.
   *
   * @param {import("./image.js").Pixels | Uint8Array} image RGBA, as a canvas gives it; or (size,
   *   size, 3) as `prepare` makes it.
   * @param {{top?: number, threshold?: number | null}} [options] top: number of classes to show.
   *   threshold: in place of the state's own.
   */
  async predict(image, { top = 1, threshold } = {}) {
    const { live } = this;
    const { preprocessing } = this.bundle.manifest;
    const { mean, std } = preprocessing;
    const prepared = image instanceof Uint8Array;
    const input = prepared ? normalise(image, mean, std) : prepare(image, preprocessing).input;
    const { logits, features } = await this.#run(live, input, 1);
    const finite = [...logits, ...(features ?? [])].every(Number.isFinite);
    need(finite, "the model computed outputs that are not finite: open the store again", 6);
    const rows = liveRows(live.state.classes);
    need(rows.length, "this device knows no class yet: apply a packet first", 7);
    const { confidence, classes } = live.state;
    const { score, probabilities } = answer(confidence, logits, features ?? []);
    const least = threshold === undefined ? thresholdOf(confidence) : threshold;
    const best = [...rows.keys()].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, top);
    return {
      known: least === null || score >= least,
      score,
      threshold: least,
      generation: live.damage ? 0 : live.record.counter,
      top: best.map((i) => ({ class: String(classes[rows[i]]), probability: probabilities[i] })),
    };
  }

  /**
   * Logits of live rows, for inputs that were prepared.
   *
   * @param {Float32Array} inputs (count, 3, size, size)
   * @param {number} count
   */
  async logits(inputs, count) {
    return (await this.#run(this.live, inputs, count)).logits;
  }

  /**
   * One change after the other.
   *
   * @param {() => Promise<unknown>} work
   */
  #alone(work) {
    const done = this.#last.then(work).then(() => this.status());
    this.#last = done.catch(() => {});
    return done;
  }

  /**
   * @param {{manifest: any, tensors: import("./container.js").Tensors}} opened
   * @param {Packet} packet
   * @param {boolean} allowOlder
   */
  async #update({ manifest, tensors }, packet, allowOlder) {
    const { live, bundle } = this;
    // what is damaged beyond its keys is left out from here on
    const record = without(live.record, live.versions.length);
    const standing = { ...live, ...record, allowOlder };
    const update = await reading(() => accepted(manifest, tensors, bundle.manifest, standing));
    const newest = /** @type {Version} */ ([update.revision, update.state.task]);
    const revoked = update.versions.reduce(
      (known, [task, revision]) => (revision ? withRevoked(known, [task, revision - 1]) : known),
      record.revoked,
    );
    const highest = isAbove(newest, record.highest) ? newest : record.highest;
    const next = { ...record, packets: [...record.packets, packet[0]], revoked, highest };
    const served = [...live.served, packet[0]];
    const versions = [...live.versions, update.versions];
    const after = { ...live, ...update, served, versions, damage: "" };
    await this.#commit(next, () => this.#proved(after), packet);
  }

  /**
   * @param {{manifest: any, envelope: any}} opened
   * @param {Packet} packet
   */
  async #rotate({ manifest, envelope }, packet) {
    const { live } = this;
    const trust = await reading(() => rotated(manifest, envelope, live.trust));
    const { record } = live;
    const next = { ...record, trust: [...record.trust, pair(packet[0], record.packets.length)] };
    const after = { ...live, trust, served: [...live.served, packet[0]] };
    await this.#commit(next, async () => after, packet);
  }

  /** @param {any} manifest */
  async #revoke(manifest) {
    const { record, versions } = this.live;
    const own = this.bundle.manifest;
    const named = await reading(async () => revocation(manifest, own, record.revoked));
    const first = versions.findIndex((each) => each.some((version) => covers(named, ...version)));
    const left = first < 0 ? record : without(record, first);
    await this.#rebuild({ ...left, revoked: withRevoked(record.revoked, named) });
  }

  /** @param {Record} record */
  async #rebuild(record) {
    await this.#commit(record, () => this.#longest(record));
  }

  /**
   * Put a record in force, if its generation can be built and its canary passes.
   *
   * @param {Record} record
   * @param {() => Promise<Live>} build
   * @param {Packet} [packet] A new one.
   */
  async #commit(record, build, packet) {
    const next = { ...record, counter: this.live.record.counter + 1 };
    const live = await build();
    await this.store.commit(next, packet);
    this.live = { ...live, record: next };
  }

  /**
   * The generation of a record, or the longest beginning of it that is intact and healthy.
   *
   * @param {Record} record
   * @returns {Promise<Live>}
   */
  async #longest(record) {
    let damage = "";
    for (let count = record.packets.length; ; count--) {
      try {
        const live = await this.#build(without(record, count));
        return { ...live, record, damage: damage || live.damage };
      } catch (error) {
        if (!(error instanceof Refused) || count === 0) throw error;
        damage ||= `generation ${record.counter} is served in part: ${error.message}`;
      }
    }
  }

  /**
   * @param {Record} record
   * @returns {Promise<Live>}
   */
  async #build(record) {
    const { bundle } = this;
    const keys = [{ place: 0, trust: bundle.trust }];
    const served = [];
    let damage = "";
    for (const [digest, place] of record.trust) {
      try {
        const last = keys[keys.length - 1].trust;
        const { manifest, envelope } = await this.#stored(digest, last);
        keys.push({ place, trust: await reading(() => rotated(manifest, envelope, last)) });
        served.push(digest);
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        keys.push({ place, trust: NOBODY }); // whoever stole the keys before must not come back in
        damage = `no packet is accepted before this is repaired: ${error.message}`;
        break;
      }
    }
    const trust = keys[keys.length - 1].trust;
    const revision = bundle.manifest.revisions.at(-1) ?? 0;
    const { state, canary } = bundle;
    /** @type {Live} */
    let live = { record, served, versions: [], state, revision, trust, canary, loaded: 0, damage };
    for (const [i, digest] of record.packets.entries()) {
      const own = keys.findLast(({ place }) => place <= i)?.trust ?? NOBODY;
      const { manifest, tensors } = await this.#stored(digest, own);
      const standing = { ...live, ...record, allowOlder: true };
      const update = await reading(() => accepted(manifest, tensors, bundle.manifest, standing));
      const versions = [...live.versions, update.versions];
      live = { ...live, ...update, versions, served: [...live.served, digest] };
    }
    return this.#proved(live);
  }

  /**
   * @param {string} digest
   * @param {Trust} trust
   */
  async #stored(digest, trust) {
    const packet = await this.store.packet(digest);
    need((await sha256(packet)) === digest, `packet ${digest} is damaged: apply it again`);
    return reading(() => openPacket(packet, trust));
  }

  /**
   * The same, with weights in the engine, once its canary has passed.
   *
   * @param {Live} live
   * @returns {Promise<Live>}
   */
  async #proved(live) {
    const { manifest, model } = this.bundle;
    /** @type {{[name: string]: Tensor}} */
    const feeds = {};
    for (const [name, { dtype, shape }] of Object.entries(manifest.weights)) {
      const data = stored(this.weight(name, live.state), dtype);
      feeds[name] = { dtype, shape: [data.length / (shape[1] ?? 1), ...shape.slice(1)], data };
      await new Promise((resume) => setTimeout(resume)); // a page goes on answering
    }
    const proved = { ...live, loaded: await this.engine.load(model, feeds) };
    const { seed, count, logits } = live.canary;
    const inputs = canaryInputs(seed, count, manifest.preprocessing);
    const outputs = await this.#run(proved, inputs, count);
    checkCanary(outputs.logits, logits, manifest.canary.tolerance);
    return proved;
  }

  /**
   * A weight of a state, as float32: adapted, or the head with its padding.
   *
   * @param {string} name
   * @param {import("./task.js").State} [state] Default: the one served.
   */
  weight(name, state = this.live.state) {
    const { capacity } = this.bundle.manifest;
    const rows = capacity || state.classes.length;
    if (name === "head.weight") return padded(state.weight, rows * state.features, 0);
    if (name === "head.bias") return padded(state.bias, rows, UNUSED);
    return merged(name, this.bundle, state);
  }

  /**
   * Logits of live rows, and features.
   *
   * @param {Live} live
   * @param {Float32Array} input
   * @param {number} count
   */
  async #run({ loaded, state }, input, count) {
    const { size } = this.bundle.manifest.preprocessing;
    const pictures = { dtype: "float32", shape: [count, 3, size, size], data: input };
    const { logits, features } = await this.engine.run(loaded, { pictures });
    const needed = state.confidence["head.unknown.mean"].data.length;
    need(features || !needed, "the model has no output `features`: export the bundle again", 6);
    const [wide, rows] = [logits.length / count, liveRows(state.classes)];
    const images = [...Array(count).keys()];
    return { logits: images.flatMap((i) => rows.map((row) => logits[i * wide + row])), features };
  }
}

/**
 * @param {string} digest
 * @param {number} place
 * @returns {[string, number]}
 */
const pair = (digest, place) => [digest, place];

/**
 * A record with its first updates only. Its keys stay.
 *
 * @param {Record} record
 * @param {number} count
 * @returns {Record}
 */
function without(record, count) {
  const trust = record.trust.map(([digest, place]) => pair(digest, Math.min(place, count)));
  return { ...record, packets: record.packets.slice(0, count), trust };
}

/**
 * @param {Float32Array} values
 * @param {number} length
 * @param {number} padding
 */
function padded(values, length, padding) {
  const all = new Float32Array(length).fill(padding);
  all.set(values);
  return all;
}
