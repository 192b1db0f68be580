/** For browsers: a device's store in IndexedDB, reading a bundle, decoding images. */

import { need, Refused } from "./check.js";

export { decode } from "./decode.js";

/** @typedef {import("./device.js").Record} Record */
/** @typedef {import("./device.js").Store} Store */

/**
 * Read files below a URL, for `openBundle`.
 *
 * @param {string} base Of the folder, relative to the page.
 * @returns {(name: string) => Promise<Uint8Array>}
 */
export function urlReader(base) {
  const folder = new URL(base.endsWith("/") ? base : `${base}/`, document.baseURI);
  return async (name) => {
    const url = new URL(encodeURIComponent(name), folder);
    const response = await fetch(url, { cache: "no-store" }).catch((error) => {
      const remedy = "check it; another site must allow this one (Access-Control-Allow-Origin)";
      throw new Refused(`${url} cannot be fetched (${error.message}): ${remedy}`, 3, error);
    });
    need(response.ok, `${url} answers ${response.status}: correct the address of the bundle`);
    return new Uint8Array(await response.arrayBuffer());
  };
}

/**
 * One database. Each change is one transaction, so a crash leaves all of it or none.
 *
 * @implements {Store}
 */
export class IndexedDbStore {
  #name;

  /** @param {string} name Of the database. */
  constructor(name) {
    this.#name = name;
  }

  /**
   * @param {{[name: string]: Uint8Array}} files
   * @param {Record} record
   */
  create(files, record) {
    return this.#changed(async (store) => {
      const taken = await done(store.get("record"));
      need(!taken, `database ${this.#name} exists: open it, or choose another name`, 2);
      for (const [name, bytes] of Object.entries(files)) store.put(bytes, `bundle/${name}`);
      store.put(record, "record");
    });
  }

  /** @param {string} name */
  file(name) {
    return this.#read(`bundle/${name}`);
  }

  /** @param {string} digest */
  packet(digest) {
    return this.#read(`packets/${digest}`, "apply it again");
  }

  /** @returns {Promise<Record>} */
  record() {
    return this.#read("record");
  }

  /** Whether a device was made here. */
  async exists() {
    return this.#read("record").then(() => true, () => false);
  }

  /** Delete the device. */
  async clear() {
    await done(indexedDB.deleteDatabase(this.#name));
  }

  /**
   * @param {Record} record
   * @param {[digest: string, bytes: Uint8Array]} [packet]
   */
  commit(record, packet) {
    return this.#changed(async (store) => {
      const { counter } = await done(store.get("record"));
      need(counter === record.counter - 1, "the store has changed: open it again", 8);
      const kept = [...record.packets, ...record.trust.map(([name]) => name)];
      for (const key of await done(store.getAllKeys(IDBKeyRange.bound("packets/", "packets/~")))) {
        if (!kept.includes(String(key).slice("packets/".length))) store.delete(key);
      }
      if (packet) store.put(packet[1], `packets/${packet[0]}`);
      store.put(record, "record");
    });
  }

  /**
   * @param {string} key
   * @param {string} [remedy]
   * @returns {Promise<any>}
   */
  async #read(key, remedy = "make the device again") {
    const database = await this.#opened();
    try {
      const found = await done(database.transaction("store").objectStore("store").get(key));
      need(found, `database ${this.#name} holds no ${key}: ${remedy}`);
      return found;
    } finally {
      database.close();
    }
  }

  /**
   * @param {(store: IDBObjectStore) => Promise<void>} change
   * @returns {Promise<void>}
   */
  async #changed(change) {
    const database = await this.#opened();
    try {
      const transaction = database.transaction("store", "readwrite", { durability: "strict" });
      const ended = new Promise((resolve, reject) => {
        transaction.oncomplete = () => resolve(undefined);
        transaction.onabort = () => reject(refused(transaction.error));
      });
      try {
        await change(transaction.objectStore("store"));
      } catch (error) {
        transaction.abort();
        await ended.catch(() => {});
        throw error;
      }
      await ended;
    } finally {
      database.close();
    }
  }

  /** @returns {Promise<IDBDatabase>} */
  #opened() {
    const request = indexedDB.open(this.#name, 1);
    request.onupgradeneeded = () => request.result.createObjectStore("store");
    return done(request);
  }
}

/** @param {DOMException | null} error */
const refused = (error) =>
  new Refused(`the browser cannot keep it (${error}): free space, then try again`, 8, error);

/**
 * @template T
 * @param {IDBRequest<T>} request
 * @returns {Promise<T>}
 */
function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(refused(request.error));
  });
}
