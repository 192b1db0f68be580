/** What people drop or choose. */

/** @typedef {{file: File, path: string}} Found `path` begins with the dropped folder, if any. */
/** @typedef {(name: string) => Promise<Uint8Array>} Read */

/**
 * The files of a drop, those of its folders included.
 *
 * @param {DataTransfer} transfer
 * @returns {Promise<Found[]>}
 */
export async function dropped(transfer) {
  // the list is emptied when the event ends: take all entries before the first await
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.());
  const plain = [...transfer.files].map((file) => ({ file, path: file.name }));
  if (entries.every((entry) => !entry)) return plain;
  return (await Promise.all(entries.map((entry) => (entry ? walk(entry) : [])))).flat();
}

/**
 * @param {any} entry
 * @returns {Promise<Found[]>}
 */
async function walk(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [{ file, path: entry.fullPath.slice(1) }];
  }
  const found = [];
  const reader = entry.createReader();
  for (;;) {
    /** @type {any[]} */
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return found;
    for (const one of some) found.push(...(await walk(one)));
  }
}

/**
 * @param {Found[]} found
 * @returns {{bundle: Read | null, packets: File[], images: File[], others: File[]}} Packets in the
 *   order of their names, so that 2.sdlora comes before 10.sdlora.
 */
export function sorted(found) {
  const manifest = found.find(({ path }) => /(^|\/)manifest\.json$/.test(path));
  if (manifest) {
    return { bundle: filesAsBundle(found, manifest.path), packets: [], images: [], others: [] };
  }
  const files = found.map(({ file }) => file).filter((file) => !file.name.startsWith("."));
  const order = new Intl.Collator("en", { numeric: true }).compare;
  const isPacket = (/** @type {File} */ file) => file.name.endsWith(".sdlora");
  const isImage = (/** @type {File} */ file) => file.type.startsWith("image/");
  return {
    bundle: null,
    packets: files.filter(isPacket).sort((one, other) => order(one.name, other.name)),
    images: files.filter(isImage),
    others: files.filter((file) => !isPacket(file) && !isImage(file)),
  };
}

/**
 * @param {Found[]} found
 * @param {string} manifest The path of its manifest.json.
 * @returns {Read}
 */
function filesAsBundle(found, manifest) {
  const folder = manifest.slice(0, -"manifest.json".length);
  return async (name) => {
    const place = found.find(({ path }) => path === folder + name);
    if (!place) throw new Error(`${folder || "the bundle"} has no ${name}: copy the whole folder`);
    return new Uint8Array(await place.file.arrayBuffer());
  };
}
