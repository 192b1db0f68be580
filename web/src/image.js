/**
 * From an image to the model's input: section 7 of docs/packet.md. The numbers are Pillow's.
 *
 * @typedef {{data: Uint8ClampedArray | Uint8Array, width: number, height: number}} Pixels
 *   Row by row, four numbers (RGBA) or three (RGB) for each pixel. Alpha is ignored.
 * @typedef {object} Preprocessing As in a bundle's manifest.
 * @property {number} size Side of the model's input, in pixels.
 * @property {number} resize Side before the crop.
 * @property {string} interpolation "nearest", "bilinear", "bicubic" or "lanczos".
 * @property {string} crop_mode "center", "squash" or "border".
 * @property {number[]} mean Of R, G and B, in units of 2^-24.
 * @property {number[]} std The same.
 */

const UNIT = 2 ** -24;
const PRECISION = 22; // bits behind the point of a weight, as in Pillow
const MAX_ASPECT = 50; // a thread of pixels would be blown up to gigabytes

/** @type {Record<string, [support: number, filter: (x: number) => number]>} */
const FILTERS = {
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, bicubic],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

/**
 * Resize, crop and normalise an upright image.
 *
 * @param {Pixels} image
 * @param {Preprocessing} preprocessing
 * @returns {{pixels: Uint8Array, input: Float32Array}} `pixels`: (size, size, 3) before it is
 *   normalised. `input`: (3, size, size), what the model takes.
 * @throws {RangeError} The image is empty, or one side is more than 50 times the other.
 */
export function prepare(image, preprocessing) {
  const { size, mean, std } = preprocessing;
  const { width, height } = image;
  if (!(Math.max(width, height) <= MAX_ASPECT * Math.min(width, height) && height > 0)) {
    throw new RangeError(
      `its shape is ${width} x ${height}; one side may be up to ${MAX_ASPECT} times the other`,
    );
  }
  const [wide, high] = newSize(width, height, preprocessing);
  const columns = overlap(wide, size);
  const rows = overlap(high, size);
  const across = tapsOf(width, wide, columns, preprocessing.interpolation);
  const down = tapsOf(height, high, rows, preprocessing.interpolation);
  const narrow = resample(image.data, height, width, across);
  const shown = resample(narrow, columns.count, height, down);

  const pixels = new Uint8Array(size * size * 3);
  const border = preprocessing.crop_mode === "border";
  if (border) pixels.forEach((_, i) => (pixels[i] = roundToEven(255 * (mean[i % 3] * UNIT))));
  for (let y = 0; y < rows.count; y++) {
    const place = ((rows.at + y) * size + columns.at) * 3;
    pixels.set(shown.subarray(3 * y * columns.count, 3 * (y + 1) * columns.count), place);
  }
  return { pixels, input: normalise(pixels, mean, std) };
}

/**
 * @param {Uint8Array} pixels (H, W, 3)
 * @param {number[]} mean In units.
 * @param {number[]} std
 * @returns {Float32Array} (3, H, W), each operation rounded to float32.
 */
export function normalise(pixels, mean, std) {
  const area = pixels.length / 3;
  const input = new Float32Array(pixels.length);
  for (let channel = 0; channel < 3; channel++) {
    const shift = Math.fround(mean[channel] * UNIT);
    const divisor = Math.fround(std[channel] * UNIT);
    const values = Float32Array.from({ length: 256 }, (_, v) =>
      Math.fround(Math.fround(Math.fround(v / 255) - shift) / divisor),
    );
    for (let i = 0; i < area; i++) input[channel * area + i] = values[pixels[3 * i + channel]];
  }
  return input;
}

/**
 * @param {number} width
 * @param {number} height
 * @param {Preprocessing} preprocessing
 * @returns {[number, number]} Width and height before the crop.
 */
function newSize(width, height, { resize, crop_mode }) {
  if (crop_mode === "squash") return [resize, resize];
  if (crop_mode === "border") {
    const ratio = Math.max(width / resize, height / resize);
    const [wide, high] = [width, height].map((side) => Math.max(1, roundToEven(side / ratio)));
    return [wide, high];
  }
  if (crop_mode !== "center") throw new RangeError(`crop_mode ${crop_mode} is not known`);
  const short = Math.min(width, height);
  return [Math.floor((width * resize) / short), Math.floor((height * resize) / short)];
}

/**
 * Where a resized side and the result's side overlap: `from` in the one, `at` in the other.
 *
 * @param {number} side
 * @param {number} size
 */
function overlap(side, size) {
  if (side < size) return { from: 0, at: Math.floor((size - side) / 2), count: side };
  return { from: roundToEven((side - size) / 2), at: 0, count: size };
}

/**
 * One pass, along the lines. They become columns, so the second pass is along the others.
 *
 * @typedef {{first: number, weights: Int32Array}} Taps Pixels of the input that one pixel of the
 *   output is made of, from `first` on, and their weights: fractions with PRECISION bits.
 *
 * @param {Uint8Array | Uint8ClampedArray} data (lines, length, 3 or 4)
 * @param {number} lines
 * @param {number} length
 * @param {Taps[]} taps One for each pixel that a line becomes.
 * @returns {Uint8ClampedArray} (taps, lines, 3)
 */
function resample(data, lines, length, taps) {
  const half = 1 << (PRECISION - 1);
  const step = data.length / (lines * length);
  const result = new Uint8ClampedArray(3 * lines * taps.length);
  for (let line = 0; line < lines; line++) {
    let out = 3 * line;
    for (const { first, weights } of taps) {
      let place = (line * length + first) * step;
      let [red, green, blue] = [half, half, half];
      for (let j = 0; j < weights.length; j++, place += step) {
        red += data[place] * weights[j];
        green += data[place + 1] * weights[j];
        blue += data[place + 2] * weights[j];
      }
      result[out] = red >> PRECISION; // and limited to 0..255 by the array
      result[out + 1] = green >> PRECISION;
      result[out + 2] = blue >> PRECISION;
      out += 3 * lines;
    }
  }
  return result;
}

/**
 * The taps of those pixels of a side that the crop keeps.
 *
 * @param {number} n Pixels of the side before.
 * @param {number} m And after.
 * @param {{from: number, count: number}} kept
 * @param {string} interpolation
 * @returns {Taps[]}
 */
function tapsOf(n, m, { from, count }, interpolation) {
  const whole = Int32Array.of(1 << PRECISION);
  const kept = Array.from({ length: count }, (_, i) => from + i);
  if (n === m) return kept.map((i) => ({ first: i, weights: whole }));
  const scale = n / m;
  if (interpolation === "nearest") {
    const places = [scale * 0.5]; // a sum, as in Pillow: it is rounded at each step
    while (places.length < from + count) places.push(places[places.length - 1] + scale);
    return kept.map((i) => ({ first: Math.trunc(places[i]), weights: whole }));
  }
  if (!(interpolation in FILTERS)) {
    throw new RangeError(`interpolation ${interpolation} is not known`);
  }
  const [support, filter] = FILTERS[interpolation];
  const stretch = Math.max(scale, 1);
  return kept.map((i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support * stretch + 0.5));
    const last = Math.min(n, Math.trunc(center + support * stretch + 0.5));
    const shares = Array.from({ length: last - first }, (_, j) =>
      filter((first + j - center + 0.5) * (1 / stretch)),
    );
    const sum = shares.reduce((total, share) => total + share, 0);
    const weights = Int32Array.from(shares, (share) => {
      const weight = (share / sum) * 2 ** PRECISION;
      return weight + (weight < 0 ? -0.5 : 0.5); // the array truncates
    });
    return { first, weights };
  });
}

/** @param {number} x */
function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/** @param {number} x */
function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

/** Halves go to the even neighbour, as in Python. @param {number} x */
function roundToEven(x) {
  const floor = Math.floor(x);
  const rest = x - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
}
