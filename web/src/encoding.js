/** How factors are stored: section 2 of docs/packet.md. */

/** @typedef {import("./container.js").Tensor} Tensor */
/**
 * @typedef {{rank: number, A: Float32Array, B: Float32Array}} Factors (rank, columns) and
 *   (rows, rank).
 */

export const ENCODINGS = ["fp32", "fp16", "int8", "int4"];
const BLOCK = 32; // numbers of int4 that share a scale

/**
 * "dtype shape" of each part.
 *
 * @param {string} encoding
 * @param {number} rank
 * @param {number[]} shape Rows and columns of the projection.
 * @returns {Record<string, string>}
 */
export function parts(encoding, rank, [rows, columns]) {
  if (encoding === "fp32" || encoding === "fp16") {
    const dtype = encoding === "fp32" ? "float32" : "float16";
    return { A: `${dtype} ${[rank, columns]}`, B: `${dtype} ${[rows, rank]}` };
  }
  if (encoding === "int8") {
    const scale = `float32 ${rank}`;
    const [A, B] = [columns, rows].map((width) => `int8 ${[rank, width]}`);
    return { A, B, "A.scale": scale, "B.scale": scale };
  }
  const [A, B] = [columns, rows].map((width) => `uint8 ${[rank, width / 2]}`);
  const [a, b] = [columns, rows].map((width) => `float16 ${[rank, Math.ceil(width / BLOCK)]}`);
  return { A, B, "A.scale": a, "B.scale": b };
}

/**
 * @param {Record<string, Tensor>} own Tensors of a task.
 * @param {string} name Of a projection.
 * @param {string} encoding
 * @returns {Factors}
 */
export function decoded(own, name, encoding) {
  const [A, B] = ["A", "B"].map((part) => {
    const stored = own[`${name}.${part}`];
    if (encoding.startsWith("fp")) return floats(stored);
    const scale = own[`${name}.${part}.scale`];
    const x = encoding === "int8" ? bytes(stored, scale) : halves(stored, scale);
    return part === "B" ? turned(x, stored.shape[0]) : x;
  });
  return { rank: own[`${name}.A`].shape[0], A, B };
}

/**
 * int8: a scale for each row.
 *
 * @param {Tensor} stored
 * @param {Tensor} scale
 */
function bytes({ data, shape }, scale) {
  return Float32Array.from(data, (q, i) => q * scale.data[Math.floor(i / shape[1])]);
}

/**
 * int4: two numbers in a byte, and a scale for each BLOCK numbers of a row.
 *
 * @param {Tensor} stored
 * @param {Tensor} scale
 */
function halves({ data, shape }, scale) {
  const [width, blocks, scales] = [2 * shape[1], scale.shape[1], floats(scale)];
  return Float32Array.from({ length: 2 * data.length }, (_, i) => {
    const q = (data[i >> 1] >> (4 * (i & 1))) & 15;
    const block = Math.floor(i / width) * blocks + Math.floor((i % width) / BLOCK);
    return (q > 7 ? q - 16 : q) * scales[block];
  });
}

/**
 * A matrix with this number of rows, transposed.
 *
 * @param {Float32Array} x
 * @param {number} rows
 */
function turned(x, rows) {
  const columns = x.length / rows;
  return x.map((_, i) => x[(i % rows) * columns + Math.floor(i / rows)]);
}

/**
 * Any numbers as float32.
 *
 * @param {Tensor} tensor
 */
export function floats({ dtype, data }) {
  if (data instanceof Float32Array) return data;
  return dtype === "float16" ? Float32Array.from(data, half) : Float32Array.from(data);
}

/** @param {number} bits Of a float16. */
function half(bits) {
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/**
 * Weights in the bundle's dtype: as they are, or rounded to float16, ties to even.
 *
 * @param {Float32Array} x
 * @param {string} dtype
 */
export const stored = (x, dtype) => (dtype === "float16" ? Uint16Array.from(x, toHalf) : x);

/** @param {number} x */
function toHalf(x) {
  const size = Math.abs(x);
  const sign = x < 0 || Object.is(x, -0) ? 0x8000 : 0;
  if (!(size < 65520)) return sign | (size >= 65520 ? 0x7c00 : 0x7e00);
  const exponent = Math.max(-14, Math.floor(Math.log2(size)));
  const steps = size / 2 ** (exponent - 10); // from 1024 to 2048, or less if it is subnormal
  const down = Math.floor(steps);
  const up = steps - down > 0.5 || (steps - down === 0.5 && down % 2 === 1) ? 1 : 0;
  return sign | (((exponent + 14) << 10) + down + up);
}
