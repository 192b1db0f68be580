import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { prepare } from "../src/image.js";

/** Made by tests/web/image_cases.py, with Pillow. */
const cases = JSON.parse(readFileSync(new URL("images.json", import.meta.url), "utf8"));

/** The same image as `drawn` in tests/web/image_cases.py. */
function drawn(width, height, numbers) {
  const data = new Uint8ClampedArray(width * height * numbers).fill(77); // and any alpha
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let channel = 0; channel < 3; channel++) {
        const kind = (Math.floor(x / 40) + Math.floor(y / 30)) % 3;
        const edge = (Math.floor(x / 5) + Math.floor(y / 7) + channel) % 2 ? 255 : 0;
        const texture = (x * 2654435 + y * 40503 + x * y * 97 + channel * 7919) % 251;
        const smooth = (x * 3 + y * 2 + channel * 60) % 256;
        data[(y * width + x) * numbers + channel] = [texture, smooth, edge][kind];
      }
    }
  }
  return { data, width, height };
}

const digest = (array) => createHash("sha256").update(new Uint8Array(array.buffer)).digest("hex");

test("fifty images give Pillow's pixels and tensors, to the bit", () => {
  assert.equal(cases.length, 50);
  for (const [i, { width, height, preprocessing, ...digests }] of cases.entries()) {
    const { pixels, input } = prepare(drawn(width, height, 3 + (i % 2)), preprocessing);
    const found = { pixels: digest(pixels), input: digest(input) };
    assert.deepEqual(found, digests, `${width} x ${height}, ${JSON.stringify(preprocessing)}`);
  }
});

test("a thread of pixels, and rules that are not known, are refused by name", () => {
  const [{ preprocessing }] = cases;
  const thread = { data: new Uint8ClampedArray(51 * 4), width: 51, height: 1 };
  assert.throws(() => prepare(thread, preprocessing), /its shape is 51 x 1/);
  const nothing = { data: new Uint8ClampedArray(0), width: 0, height: 0 };
  assert.throws(() => prepare(nothing, preprocessing), /its shape is 0 x 0/);
  const image = drawn(20, 10, 4);
  for (const odd of [{ interpolation: "area" }, { crop_mode: "fill" }]) {
    const [word] = Object.values(odd);
    assert.throws(() => prepare(image, { ...preprocessing, ...odd }), new RegExp(word));
  }
});
