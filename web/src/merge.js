/** W_t = W_e + sum of (alpha_k(t) - alpha_k(e)) B_k A_k: section 2 of docs/packet.md. */

import { UNIT } from "./task.js";

/** @typedef {import("./task.js").State} State */

/**
 * An adapted weight of a later state, always computed from the bundle's.
 *
 * Tasks are added first to last, each product and sum in one rounding (a fused multiply-add), as
 * the matrix product behind numpy does on most processors. There, weights are equal to the bit.
 *
 * @param {string} name
 * @param {import("./bundle.js").Bundle} bundle
 * @param {State} state
 * @returns {Float32Array}
 */
export function merged(name, bundle, state) {
  const weight = bundle.weights[name].slice();
  for (const [i, { name: own, tensor, rows, shape }] of bundle.manifest.projections.entries()) {
    if (tensor !== name) continue;
    const columns = shape[1];
    const terms = state.factors.flatMap((task, k) => {
      const away = of(state.magnitudes[k], i) - of(bundle.state.magnitudes[k] ?? 0, i);
      return own in task && away ? [{ ...task[own], c: Math.fround(away * UNIT) }] : [];
    });
    const sums = new Float32Array(columns);
    for (let row = 0; terms.length && row < shape[0]; row++) {
      sums.fill(0);
      for (const { rank, A, B, c } of terms) {
        for (let r = 0; r < rank; r++) {
          const a = A.subarray(r * columns, (r + 1) * columns);
          addProduct(sums, Math.fround(B[row * rank + r] * c), a);
        }
      }
      const start = (rows[0] + row) * columns;
      for (let j = 0; j < columns; j++) weight[start + j] += sums[j];
    }
  }
  return weight;
}

/**
 * @param {number | number[]} magnitude Of a task.
 * @param {number} projection
 */
const of = (magnitude, projection) =>
  Array.isArray(magnitude) ? magnitude[projection] : magnitude;

/**
 * sums += b a, in one rounding for each number.
 *
 * A product of two float32 is exact in float64, so only the sum is rounded: to float64, then to
 * float32. The second rounding is wrong if the first one made a tie.
 *
 * @param {Float32Array} sums
 * @param {number} b
 * @param {Float32Array} a
 */
function addProduct(sums, b, a) {
  for (let j = 0; j < a.length; j++) {
    const [product, sum] = [b * a[j], sums[j]];
    const wide = product + sum;
    const near = Math.fround(wide);
    const other = 2 * wide - near; // as far from `wide` on its other side
    if (near !== wide && Math.fround(other) === other) {
      const rest = wide - product;
      const error = product - (wide - rest) + (sum - rest); // what float64 lost
      sums[j] = error > 0 ? Math.max(near, other) : error < 0 ? Math.min(near, other) : near;
    } else sums[j] = near;
  }
}
