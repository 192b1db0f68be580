/**
 * The vectors prove something: a reader with one of these mistakes fails at least one. The same
 * mistakes as in tests/test_vector_sabotage.py, and each rule left out in turn.
 *
 * @typedef {Record<string, string>} Sources {name of a module: its text}
 */

import { wrong } from "./vectors.js";

/** @type {[about: string, file: string, right: string, wrong: string][]} */
const MISTAKES = [
  // signatures and keys
  ["a signature of a known key is not checked", "ed25519", "return crypto.subtle.verify(", "return true || crypto.subtle.verify("],
  ["the threshold is ignored", "container", "need(good >= least", "need(good >= 1"],
  ["every signature must be good", "container", "message))) good++;", "message))) good++; else if (key) good = -16;"],
  ["one key counts twice", "container", "signers.size === count", "signers.size > 0"],
  ["new keys need not sign", "control", "await verified(envelope, trust);", "await verified(envelope, current);"],
  ["old keys stay in force", "control", "  return trust;\n}\n\n/**\n * What a", "  return { ...current, version: trust.version };\n}\n\n/**\n * What a"],
  ["a signature's second half is read in the wrong order", "ed25519", "number(signature.subarray(32))", "number(signature.slice(32).reverse())"],
  ["a key may be the neutral element", "ed25519", " && x !== 0n", ""],
  ["a key may be of any order", "ed25519", " && isNeutral(times(ORDER, [x, y, 1n]))", ""],
  ["a key need not be on the curve", "ed25519", "x !== undefined && isCanonical(bytes) && x !== 0n && isNeutral(times(ORDER, [x, y, 1n]))", "x === undefined || (isCanonical(bytes) && x !== 0n && isNeutral(times(ORDER, [x, y, 1n])))"],
  // form
  ["whole numbers may be true or false", "check", "Number.isInteger(value) && least", "least"],
  ["tensors may come in any order", "container", "sorted(Object.keys(table)).sort((a, b) => size(b) - size(a))", "Object.keys(table).sort((a, b) => table[a].data_offsets[0] - table[b].data_offsets[0])"],
  ["names need not be in NFC", "task", ' && name === name.normalize("NFC")', ""],
  ["names may hold control characters", "task", "[\\p{Cc}\\p{Cf}\\p{Cs}\\p{Co}/\\\\]", "[/\\\\]"],
  ["NaN is within the limits", "task", "(x) => least <= x && x <= most", "(x) => !(x < least || x > most)"],
  ["scales have the limit of factors", "task", "LARGEST / 128]", "LARGEST]"],
  // the head
  ["the rows of head.old.index are the first ones", "task", "weight[row * width + j] +=", "weight[i * width + j] +="],
  ["the biases of head.old.index are the first ones", "task", "bias[row] = own", "bias[i] = own"],
  ["known biases are added", "task", "bias[row] = own", "bias[row] += own"],
  ["the scale of known rows is ignored", "task", "steps[i * width + j] * scale)", "steps[i * width + j])"],
  ["known rows are rounded once", "task", "+= Math.fround(steps[i * width + j] * scale)", "+= steps[i * width + j] * scale"],
  ["steps are summed in 16 bits", "task", "const sums = new Float32Array(m * width)", "const sums = new Int16Array(m * width)"],
  ["left and right are unsigned", "task", "const factor = left.data[i * s + l]", "const factor = left.data[i * s + l] & 255"],
  ["the scale of new rows is ignored", "task", "= q * scales[Math.floor(i / width)]", "= q"],
  ["new rows share a scale", "task", "q * scales[Math.floor(i / width)]", "q * scales[0]"],
  ["new rows come first", "task", "weight[known * width + i] =", "weight[i] ="],
  // what the logits are worth
  ["the temperature multiplies", "confidence", "/ temperature[0]", "* temperature[0]"],
  ["the temperature is ignored", "confidence", " / temperature[0]", ""],
  ["the score ignores the components", "confidence", "score -= (scale[j]", "score -= 0 * (scale[j]"],
  ["components are not squared", "confidence", "+ bias[j]) ** 2", "+ bias[j])"],
  ["the scale of components is ignored", "confidence", "scale[j] * inner", "inner"],
  ["the bias of components is ignored", "confidence", "inner + bias[j]", "inner"],
  ["components are unsigned", "confidence", "q[j * z.length + c]", "(q[j * z.length + c] & 255)"],
  ["the temperature before stays", "task", "confidence: byName(CONFIDENCE, (name) => own[name])", 'confidence: byName(CONFIDENCE, (name) => (name === "head.temperature" ? state.confidence : own)[name])'],
  ["retired rows have a place in the unknown score", "task", "checkConfidence(own, live(classes).length", "checkConfidence(own, classes.length"],
  ["the score ignores the features", "confidence", "f < mean.length", "f < 0"],
  ["the precision is a variance", "confidence", "(features[f] - mean[f])) ** 2", "(features[f] - mean[f]))"],
  ["the mean is not taken off", "confidence", "features[f] - mean[f]", "features[f]"],
  ["a temperature is anything above 0", "confidence", "temperature >= 2 ** -24", "temperature > 0"],
  ["a threshold has the limit of weights", "confidence", "Math.abs(x) <= LARGEST_LOGIT", "Math.abs(x) <= 10_000"],
  // encodings
  ["int8 is taken as unsigned", "encoding", "(q, i) => q * scale", "(q, i) => (q & 255) * scale"],
  ["int8 ends at -127", "encoding", "(q, i) => q * scale", "(q, i) => Math.max(q, -127) * scale"],
  ["int4: the upper four bits come first", "encoding", "(4 * (i & 1))", "(4 * (1 - (i & 1)))"],
  ["int4: eight stands for zero", "encoding", "(q > 7 ? q - 16 : q)", "(q - 8)"],
  ["int4: -8 is taken as 8", "encoding", "q > 7 ?", "q > 8 ?"],
  ["int4: blocks of scales alternate", "encoding", "Math.floor((i % width) / BLOCK)", "((i % width) % blocks)"],
  ["int4: one scale for a whole row", "encoding", "Math.floor((i % width) / BLOCK)", "0"],
  ["fp16: subnormal numbers are zero", "encoding", "return sign * fraction * 2 ** -24", "return sign * 0"],
  ["B is not turned", "encoding", 'part === "B" ? turned', "false ? turned"],
  // digests
  ["deltas have another unit", "task", "export const UNIT = 2 ** -24", "export const UNIT = 2 ** -23"],
  ["class names are not digested", "task", "{ classes: task.classes, deltas,", "{ deltas,"],
  ["new names are not digested", "task", "deltas, renamed, retired, tensors", "deltas, retired, tensors"],
  ["retired rows are not digested", "task", "renamed, retired, tensors", "renamed, tensors"],
  ["tensors are digested in the order of the file", "container", "const parts = sorted(Object.keys(tensors))", "const parts = Object.keys(tensors)"],
  ["states are chained in hexadecimal", "task", "sha256(unhex(state.digest), ", "sha256(state.digest, "],
  // classes
  ["a retired row keeps its weight", "task", "weight.fill(0, row * width, (row + 1) * width);", ""],
  ["a retired row keeps its bias", "task", "bias[row] = UNUSED;", ""],
  ["a retired row has the bias -inf", "task", "UNUSED = -1e30", "UNUSED = -Infinity"],
  ["names are exchanged one after the other", "task", "classes[row] = renaming;", 'need(!classes.includes(renaming), "");\n    classes[row] = renaming;'],
  ["the name of a retired class never comes back", "task", "new Set(names).size === names.length", "new Set(names).size === names.length && !added.some((/** @type {any} */ one) => before.includes(one))"],
  ["a retired row is taken out", "task", "classes.push(...added);", "classes.push(...added);\n  for (const row of [...retired].reverse()) classes.splice(row, 1);"],
  ["retired rows have a place in the canary", "accept", "const rows = live(state.classes).length", "const rows = state.classes.length"],
  // weights
  ["magnitudes are not added up", "task", "old[i] + whole(delta", "0 * old[i] + whole(delta"],
  ["magnitudes are in the opposite order", "merge", "of(state.magnitudes[k], i)", "of(state.magnitudes[state.magnitudes.length - 1 - k], i)"],
  ["the bundle's magnitudes are not taken off", "merge", " - of(bundle.state.magnitudes[k] ?? 0, i)", ""],
  ["the bundle's factors are ignored", "bundle", "return byName(names, (name) => decoded(", "return byName([], (name) => decoded("],
  ["projections share the first magnitude", "merge", "magnitude[projection]", "magnitude[0]"],
  ["a projection's rows are the first ones", "merge", "(rows[0] + row)", "row"],
  ["weights are not rounded to the bundle's dtype", "encoding", 'dtype === "float16" ? Uint16Array.from(x, toHalf)', 'dtype === "float16" ? Uint16Array.from(x, (one) => toHalf(one) & 0xfff8)'],
  // the canary
  ["the canary is not checked", "canary", " && difference <= allowed", ""],
  ["the canary's own tolerance is ignored", "device", "manifest.canary.tolerance", "manifest.tolerance"],
  ["the canary's tolerance is absolute", "canary", "Math.max(most, x), 0) / scale", "Math.max(most, x), 0)"],
  ["the canary shows its first squares", "canary", "CELLS * Math.floor((CELLS * y) / size) + Math.floor((CELLS * x) / size)", "CELLS * y + x"],
  ["the canary is blue, green, red", "canary", "3 * cell + (i % 3)", "3 * cell + 2 - (i % 3)"],
  ["the canary lies on its side", "canary", "CELLS * Math.floor((CELLS * y) / size) + Math.floor((CELLS * x) / size)", "CELLS * Math.floor((CELLS * x) / size) + Math.floor((CELLS * y) / size)"],
  // order, capacity, revocations
  ["the states that led to the bundle are not known", "bundle", "      before,\n", "      before: [],\n"],
  ["a capacity of 0 is no room", "accept", "bundle.capacity === 0 || ", ""],
  ["a full capacity is too much", "accept", "state.classes.length <= bundle.capacity", "state.classes.length < bundle.capacity"],
  ["only the last task of a squash is followed", "accept", "for (const task of tasks) {", "for (const task of tasks.slice(-1)) {"],
  ["only the first task of a squash may be revoked", "accept", "versions.some((version) => isRevoked(", "versions.slice(0, 1).some((version) => isRevoked("],
  ["only the newest packet is applied already", "accept", "[digest, ...standing.state.before]", "[digest]"],
  ["keys are never applied already", "device", "trust, served: [...live.served, packet[0]]", "trust, served: live.served"],
  ["a revocation is forgotten", "device", "withRevoked(record.revoked, named)", "record.revoked"],
  ["a revision revokes nothing", "device", "(revision ? withRevoked(", "(false ? withRevoked("],
  ["a revocation drops one packet", "device", "without(record, first)", "without(record, versions.length - 1)"],
  ["a revocation is of one task", "control", "task >= version[0]", "task === version[0]"],
  ["a revocation is of every revision", "control", "task >= version[0] && revision <= version[1]", "task >= version[0]"],
  ["what was rolled back may come again", "device", "isAbove(newest, record.highest) ? newest : record.highest", "/** @type {Version} */ ([0, 0])"],
  ["the task counts before the revision", "accept", "a[0] > b[0] || (a[0] === b[0] && a[1] > b[1])", "a[1] > b[1] || (a[1] === b[1] && a[0] > b[0])"],
  ["the bundle is not newer than any packet", "device", "[bundle.manifest.revisions.at(-1) ?? 0, task]", "[0, 0]"],
  ["a device forgets the revision that it is in", "accept", "return { state, revision, versions", "return { state, revision: 0, versions"],
];

/** Modules whose every rule has a vector. */
const RULED = ["canonical", "check", "container", "control", "task", "accept", "confidence", "canary"];

/**
 * Rules that no vector needs: some would need files that are too large; for the others something
 * else fails in Python, while JavaScript would compute with "1" or [1] as with 1.
 */
const UNTRIED = [
  "need(data.length <= LARGEST",
  "need(found.length <= 1000",
  "need(classes.length <= 1_000_000",
  "whole(side, name",
  "whole(stop, name",
  "need(bytes === numbers",
  "whole(manifest.sequence, \"the task\")",
  "whole(manifest.canary.seed",
];

/**
 * Every sabotage: {about, sources} of a reader that is changed in one place.
 *
 * @param {Sources} sources
 */
export function sabotages(sources) {
  const mistakes = MISTAKES.map(([about, file, right, changed]) => {
    const text = sources[file];
    if (text.split(right).length !== 2) throw new Error(`${about}: not once in ${file}.js: ${right}`);
    return { about, sources: { ...sources, [file]: text.replace(right, () => changed) } };
  });
  const rules = RULED.flatMap((file) => {
    const places = [...sources[file].matchAll(/(?<!function )\b(?:need|whole)\(/g)];
    return places.map(({ index, 0: call }) => {
      const [before, after] = [sources[file].slice(0, index), sources[file].slice(index + call.length)];
      const skip = call === "need(" ? "(() => {})(" : "((/** @type {any} */ one) => one)(";
      const about = `${file}.js: ${call}${after.slice(0, 40).split("\n")[0].trim()}`;
      return { about, sources: { ...sources, [file]: before + skip + after } };
    });
  });
  return [...mistakes, ...rules.filter(({ about }) => !UNTRIED.some((rule) => about.includes(rule)))];
}

/**
 * The first vector that a reader fails, and how; or "".
 *
 * @param {Awaited<ReturnType<typeof import("./vectors.js").readings>>} having Of that reader.
 */
export async function failure(having) {
  const slow = (/** @type {any} */ vector) => 100 * vector.name.includes("keys") + vector.steps.length;
  for (const vector of having.index.vectors.toSorted((/** @type {any} */ a, /** @type {any} */ b) => slow(a) - slow(b))) {
    const found = await wrong(vector, having).catch((error) => `${vector.name}: ${error}`);
    if (found) return found;
  }
  return "";
}
