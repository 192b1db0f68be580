/** A device's store in a folder, for Node. */

import { createHash } from "node:crypto";
import * as fs from "node:fs/promises";
import { dirname, join } from "node:path";

import { Refused } from "./check.js";

/** @typedef {import("./device.js").Record} Record */
/** @typedef {import("./device.js").Store} Store */

/**
 * Read files of a folder, for `openBundle`.
 *
 * @param {string} folder
 * @returns {(name: string) => Promise<Uint8Array>}
 */
export const folderReader = (folder) => (name) => fs.readFile(join(folder, name));

/**
 * bundle/, packets/DIGEST, and generations/COUNTER: the record in force is the highest intact one.
 *
 * @implements {Store}
 */
export class FolderStore {
  /** @param {string} path */
  constructor(path) {
    this.path = path;
    this.file = folderReader(join(path, "bundle"));
  }

  /** @param {string} digest */
  async packet(digest) {
    return folderReader(join(this.path, "packets"))(digest).catch((error) => {
      const problem = `packet ${digest} cannot be read (${error.code}): apply it again`;
      throw new Refused(problem, 3, error);
    });
  }

  /**
   * @param {{[name: string]: Uint8Array}} files
   * @param {Record} record
   */
  async create(files, record) {
    const made = `${this.path}.new-${process.pid}`;
    await fs.rm(made, { recursive: true, force: true });
    for (const folder of ["bundle", "packets", "generations"]) {
      await fs.mkdir(join(made, folder), { recursive: true, mode: 0o700 });
    }
    for (const [name, bytes] of Object.entries(files)) {
      await durable(join(made, "bundle", name), bytes);
    }
    await durable(join(made, "generations", String(record.counter)), written(record));
    for (const folder of ["bundle", "packets", "generations", "."]) {
      await synced(join(made, folder));
    }
    await fs.rename(made, this.path).catch((error) => {
      const problem = `${this.path} cannot be made (${error.code}): choose a new folder`;
      throw new Refused(problem, 2, error);
    });
    await synced(dirname(this.path));
  }

  /** @returns {Promise<Record>} */
  async record() {
    for (const counter of (await this.#counters()).reverse()) {
      const record = await this.#read(counter);
      if (record) return record;
    }
    throw new Refused(`${this.path} holds no intact generation: flash the device again`);
  }

  /**
   * Whatever happens before the link, the old record is in force. After it, the new one is.
   *
   * @param {Record} record
   * @param {[digest: string, bytes: Uint8Array]} [packet]
   */
  async commit(record, packet) {
    await this.#written(record, packet).catch((error) => {
      const full = `the disk cannot keep it (${error}): free space, then try again`;
      const late = "the store has changed: open it again";
      throw new Refused(error.code === "EEXIST" ? late : full, 8, error);
    });
    await this.#sweep(record).catch(() => {}); // what is left is removed next time
  }

  /**
   * @param {Record} record
   * @param {[digest: string, bytes: Uint8Array]} [packet]
   */
  async #written(record, packet) {
    if (packet) {
      const [digest, bytes] = packet;
      const place = join(this.path, "packets", digest);
      await durable(`${place}.new`, bytes);
      await fs.rename(`${place}.new`, place);
      await synced(join(this.path, "packets"));
    }
    const place = join(this.path, "generations", String(record.counter));
    const made = `${place}.new-${process.pid}`;
    await durable(made, written(record));
    try {
      await fs.link(made, place); // a rename would take the number of another process
    } finally {
      await fs.rm(made, { force: true });
    }
    await synced(join(this.path, "generations"));
  }

  /**
   * Remove what only records before the last two need. The one before is kept, in case the disk
   * damages the new one.
   *
   * @param {Record} record
   */
  async #sweep(record) {
    const counters = await this.#counters();
    const kept = [...named(record), ...named(await this.#read(record.counter - 1))];
    for (const counter of counters.filter((one) => one < record.counter - 1)) {
      const old = named(await this.#read(counter));
      for (const digest of old.filter((one) => !kept.includes(one))) {
        await fs.rm(join(this.path, "packets", digest), { force: true });
      }
      await fs.rm(join(this.path, "generations", String(counter)), { force: true });
    }
  }

  /** Numbers of the records, ascending. */
  async #counters() {
    const names = await fs.readdir(join(this.path, "generations"));
    return names.filter((name) => /^\d+$/.test(name)).map(Number).sort((a, b) => a - b);
  }

  /**
   * @param {number} counter
   * @returns {Promise<Record | undefined>} undefined: it is damaged.
   */
  async #read(counter) {
    try {
      const place = join(this.path, "generations", String(counter));
      const [body, checksum] = (await fs.readFile(place, "utf8")).split("\n");
      return checksum === sum(body) ? JSON.parse(body) : undefined;
    } catch {
      return undefined;
    }
  }
}

/** @param {string} body */
const sum = (body) => createHash("sha256").update(body).digest("hex");

/** @param {Record} record */
function written(record) {
  const body = JSON.stringify(record);
  return Buffer.from(`${body}\n${sum(body)}`);
}

/** @param {Record} [record] Digests of all packets that it needs. */
const named = (record) =>
  record ? [...record.packets, ...record.trust.map(([digest]) => digest)] : [];

/**
 * Write a file that a power cut cannot take back once its folder is synced.
 *
 * @param {string} path
 * @param {Uint8Array} bytes
 */
async function durable(path, bytes) {
  const file = await fs.open(path, "w", 0o600);
  try {
    await file.writeFile(bytes);
    await file.sync();
  } finally {
    await file.close();
  }
}

/** @param {string} folder */
async function synced(folder) {
  const opened = await fs.open(folder);
  try {
    await opened.sync();
  } finally {
    await opened.close();
  }
}
