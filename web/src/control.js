/** Keys and revocations: section 4 of docs/packet.md. */

import { dump, isHex, sha256 } from "./canonical.js";
import { fields, need, whole } from "./check.js";
import { verified } from "./container.js";
import { isKey } from "./ed25519.js";

/** @typedef {import("./container.js").Trust} Trust */
/** @typedef {[task: number, revision: number]} Version */

/**
 * Keys of a packet or a bundle, once they were checked.
 *
 * @param {any} trust
 * @returns {Promise<Trust>}
 */
export async function checkedTrust(trust) {
  const { keys, threshold, version } = fields(trust, "keys threshold version", "trust");
  const count = Object.keys(keys).length;
  whole(version, "the version of the keys", 1_000_000, 1);
  whole(threshold, "the threshold", count, 1);
  need(count <= 16, `${count} keys are more than 16: get the packet again`);
  for (const [keyid, key] of Object.entries(keys)) {
    const { public: digits } = key.keyval;
    const [keytype, scheme] = ["ed25519", "ed25519"];
    const right = dump(key) === dump({ keytype, keyval: { public: digits }, scheme });
    need(right && isHex(digits) && isKey(digits), `key ${keyid} is not a sound Ed25519 key`);
    const named = await sha256(dump({ keytype, public: digits, scheme }));
    need(keyid === named, `key ${keyid} has another name, ${named}: get the packet again`);
  }
  return trust;
}

/**
 * The keys that a trust packet puts in force.
 *
 * @param {any} manifest
 * @param {any} envelope
 * @param {Trust} current
 */
export async function rotated(manifest, envelope, current) {
  fields(manifest, "content format kind trust", "a trust packet");
  const trust = await checkedTrust(manifest.trust);
  await verified(envelope, trust);
  need(dump(trust) !== dump(current), `keys of version ${trust.version} are in force already`, 7);
  const newer = trust.version > current.version;
  need(newer, `keys of version ${trust.version} are not newer: get a newer trust packet`, 4);
  return trust;
}

/**
 * What a revocation revokes.
 *
 * @param {any} manifest
 * @param {{states: string[], revisions: number[]}} bundle Its manifest.
 * @param {Version[]} revoked
 * @returns {Version}
 */
export function revocation(manifest, bundle, revoked) {
  fields(manifest, "content format kind lineage revision sequence", "a revocation");
  const task = whole(manifest.sequence, "the task", 1_000_000, 1);
  const revision = whole(manifest.revision, "the revision");
  need(isHex(manifest.lineage), `lineage ${manifest.lineage} is no digest: get the packet again`);
  const own = manifest.lineage === bundle.states[0];
  need(own, "the revocation is for another lineage: get the one for this device's bundle", 5);
  need(!isRevoked(revoked, task, revision), `task ${task} is revoked already`, 7);
  const inside = bundle.revisions.some((r, i) => covers([task, revision], i + 1, r));
  need(!inside, `task ${task} is part of the bundle: flash this device with another bundle`, 5);
  return [task, revision];
}

/**
 * @param {Version} version
 * @param {number} task
 * @param {number} revision
 */
export const covers = (version, task, revision) => task >= version[0] && revision <= version[1];

/**
 * @param {Version[]} revoked
 * @param {number} task
 * @param {number} revision
 */
export const isRevoked = (revoked, task, revision) =>
  revoked.some((version) => covers(version, task, revision));

/**
 * Revocations with another one. What it covers is left out.
 *
 * @param {Version[]} revoked
 * @param {Version} version
 */
export function withRevoked(revoked, version) {
  if (isRevoked(revoked, ...version)) return revoked;
  const found = [...revoked.filter((old) => !covers(version, ...old)), version];
  need(found.length <= 1000, "this device remembers 1,000 revocations: flash it again");
  return found;
}
