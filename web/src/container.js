/** A packet's bytes, its signatures and its tensors: section 1 of docs/packet.md. */

import { byName, concat, dump, encode, isHex } from "./canonical.js";
import { parse, sha256, sorted, unbase64 } from "./canonical.js";
import { fields, need, whole } from "./check.js";
import { hasSigned, isScalar } from "./ed25519.js";

export const FORMAT = "sdlora-edge/packet/3";
const TYPE = "application/vnd.sdlora-edge.packet+json";
const LARGEST = 2 ** 26;

/**
 * @typedef {object} Tensor
 * @property {string} dtype "float32", "int32", "float16", "int8" or "uint8".
 * @property {number[]} shape
 * @property {Float32Array | Int32Array | Uint16Array | Int8Array | Uint8Array} data Row by row.
 *   float16 as the bits of each number.
 * @typedef {Record<string, Tensor>} Tensors
 * @typedef {{version: number, threshold: number, keys: Record<string, any>}} Trust
 */

/** @type {Record<string, [dtype: string, array: any]>} */
const DTYPES = {
  F32: ["float32", Float32Array],
  I32: ["int32", Int32Array],
  F16: ["float16", Uint16Array],
  I8: ["int8", Int8Array],
  U8: ["uint8", Uint8Array],
};

/**
 * Verify a packet.
 *
 * @param {Uint8Array} data
 * @param {Trust} trust
 * @returns {Promise<{manifest: any, tensors: Tensors, envelope: any}>}
 */
export async function openPacket(data, trust) {
  need(data.length <= LARGEST, `the packet has ${data.length} bytes: ask for a smaller one`);
  const n = Number(new DataView(data.buffer, data.byteOffset).getBigUint64(0, true));
  need(n <= 2 ** 20 && 8 + n <= data.length, `the header claims ${n} bytes: get it again`);
  const header = data.subarray(8, 8 + n);
  const content = data.subarray(8 + n);
  const { __metadata__: about, ...table } = parse(header);
  const text = dump({ __metadata__: about, ...table });
  const written = encode(text.padEnd(8 * Math.ceil(text.length / 8)));
  need(equal(header, written), "the header is not canonical: get the packet again");
  fields(about, "envelope format", "the header");
  need(about.format === FORMAT, `format ${about.format} is not ${FORMAT}: update this program`);
  const envelope = parse(encode(about.envelope));
  need(about.envelope === dump(envelope), "the envelope is not canonical: get the packet again");
  const manifest = parse(await verified(envelope, trust));
  const { format } = manifest;
  need(format === FORMAT, `format ${format} is not ${FORMAT}: update this program`);
  const digest = await sha256(dump(table), content);
  need(manifest.content === digest, "the content is damaged: get the packet again");
  return { manifest, tensors: tensorsOf(table, content), envelope };
}

/**
 * @param {Uint8Array} a
 * @param {Uint8Array} b
 */
const equal = (a, b) => a.length === b.length && a.every((byte, i) => byte === b[i]);

/**
 * The signed bytes.
 *
 * @param {any} envelope
 * @param {Trust} trust
 */
export async function verified(envelope, trust) {
  fields(envelope, "payload payloadType signatures", "the envelope");
  const { payloadType, signatures } = envelope;
  const payload = unbase64(envelope.payload);
  const count = signatures.length;
  need(1 <= count && count <= 16, `${count} signatures are not 1 to 16: sign the packet again`);
  const signers = new Set(signatures.map((/** @type {any} */ one) => one.keyid));
  need(signers.size === count, "a key has signed twice: sign the packet again");
  /** @type {Uint8Array[]} */
  const halves = signatures.map((/** @type {any} */ signature) => {
    const { keyid, sig } = fields(signature, "keyid sig", "a signature");
    need(isHex(keyid), `keyid ${keyid} is no digest: sign the packet again`);
    const bytes = unbase64(sig);
    need(bytes.length === 64 && isScalar(bytes), "a signature is malformed: sign the packet again");
    return bytes;
  });
  need(payloadType === TYPE, `payload type ${payloadType} is not ${TYPE}: get a packet`, 4);
  const message = concat([encode(`DSSEv1 ${TYPE.length} ${TYPE} ${payload.length} `), payload]);
  let good = 0;
  for (const [i, { keyid }] of signatures.entries()) {
    const key = Object.hasOwn(trust.keys, keyid) && trust.keys[keyid];
    if (key && (await hasSigned(key.keyval.public, halves[i], message))) good++;
  }
  const least = trust.threshold;
  need(good >= least, `${good} of ${least} trusted keys have signed: get the signed packet`, 4);
  return payload;
}

/**
 * The tensors of a table, which tile the data.
 *
 * @param {Record<string, any>} table
 * @param {Uint8Array} content
 */
function tensorsOf(table, content) {
  /** @type {Tensors} */
  const found = Object.create(null);
  /** @param {string} name */
  const size = (name) => DTYPES[table[name].dtype][1].BYTES_PER_ELEMENT;
  let end = 0;
  for (const name of sorted(Object.keys(table)).sort((a, b) => size(b) - size(a))) {
    fields(table[name], "data_offsets dtype shape", name);
    const [begin, stop, ...more] = table[name].data_offsets;
    need(begin === end && !more.length, `${name} begins at ${begin}, not ${end}: get it again`);
    found[name] = tensorAt(table[name], content, name);
    end = stop;
  }
  need(end === content.length, "bytes belong to no tensor: get the packet again");
  return found;
}

/**
 * The tensor of one entry, as a copy.
 *
 * @param {any} entry
 * @param {Uint8Array} content
 * @param {string} name
 * @returns {Tensor}
 */
function tensorAt({ data_offsets: [begin, stop], dtype, shape }, content, name) {
  const [kind, array] = DTYPES[dtype];
  for (const side of shape) whole(side, name, LARGEST);
  const numbers = shape.reduce((/** @type {number} */ a, /** @type {number} */ b) => a * b, 1);
  const bytes = whole(stop, name, content.length) - begin;
  need(bytes === numbers * array.BYTES_PER_ELEMENT, `${name} does not fit its shape: get it again`);
  const copy = new Uint8Array(content.subarray(begin, stop)); // its own buffer is aligned
  return { dtype: kind, shape, data: new array(copy.buffer) };
}

/**
 * The tensors of any safetensors file.
 *
 * @param {Uint8Array} data
 */
export function safetensors(data) {
  const content = 8 + Number(new DataView(data.buffer, data.byteOffset).getBigUint64(0, true));
  const { __metadata__: about, ...table } = parse(data.subarray(8, content));
  const rest = data.subarray(content);
  return byName(Object.keys(table), (name) => tensorAt(table[name], rest, name));
}

/**
 * Section 5.
 *
 * @param {Tensors} tensors
 */
export async function tensorsDigest(tensors) {
  const parts = sorted(Object.keys(tensors)).flatMap((name) => {
    const { dtype, shape, data } = tensors[name];
    const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    return [encode(dump([name, dtype, shape])), bytes];
  });
  return sha256(...parts);
}
