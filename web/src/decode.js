/**
 * From an image file to upright pixels, by the browser's own decoder.
 *
 * The pixels of files that are stored without loss equal those of a Python device. Decoders of JPEG
 * round differently: docs/guides/browser.md says by how much.
 */

/** @typedef {import("./image.js").Pixels} Pixels */

/**
 * @param {Blob | ImageBitmapSource} source A file, or what a canvas can draw, such as a video.
 * @returns {Promise<Pixels>} RGBA, turned as the file's EXIF orientation says.
 * @throws {Error} The browser cannot read it.
 */
export async function decode(source) {
  const bitmap = await createImageBitmap(source, {
    imageOrientation: "from-image",
    premultiplyAlpha: "none",
    colorSpaceConversion: "none",
  });
  try {
    const { width, height } = bitmap;
    const data = drawn(bitmap);
    const opaque = data.every((value, i) => i % 4 !== 3 || value === 255);
    return { data: opaque ? data : (uploaded(bitmap) ?? data), width, height };
  } finally {
    bitmap.close();
  }
}

/** @param {ImageBitmap} bitmap */
function drawn(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (!context) throw new Error("this browser gives no canvas to read the image from");
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}

/**
 * A canvas multiplies colours by alpha, so a transparent pixel loses its own. A texture keeps it.
 *
 * @param {ImageBitmap} bitmap
 * @returns {Uint8ClampedArray | null} Null if the browser has no WebGL, or none for this size.
 */
function uploaded(bitmap) {
  const gl = new OffscreenCanvas(1, 1).getContext("webgl2");
  if (!gl) return null;
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  const texture = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA8, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  const data = new Uint8Array(bitmap.width * bitmap.height * 4);
  gl.readPixels(0, 0, bitmap.width, bitmap.height, gl.RGBA, gl.UNSIGNED_BYTE, data);
  const failed = gl.getError() !== gl.NO_ERROR;
  gl.getExtension("WEBGL_lose_context")?.loseContext();
  return failed ? null : new Uint8ClampedArray(data.buffer);
}
