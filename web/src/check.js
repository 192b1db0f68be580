/** How anything is refused. */

/** A packet, a bundle or a store that is refused. Nothing has changed. */
export class Refused extends Error {
  /**
   * @param {string} message What is wrong, then what to do.
   * @param {number} [exitCode] As in docs/packet.md: 3 damaged, 4 not trusted, 5 not for this
   *   device, 6 canary failed, 7 nothing to do, 8 try again.
   * @param {unknown} [cause]
   */
  constructor(message, exitCode = 3, cause) {
    super(message, { cause });
    this.name = "Refused";
    this.exitCode = exitCode;
  }
}

/**
 * Refuse unless this holds.
 *
 * @param {unknown} right
 * @param {string} message
 * @param {number} [exitCode]
 * @returns {asserts right}
 */
export function need(right, message, exitCode) {
  if (!right) throw new Refused(message, exitCode);
}

/**
 * An integer from `least` to `most`.
 *
 * @param {any} value
 * @param {string} name
 * @param {number} [most]
 * @param {number} [least]
 * @returns {number}
 */
export function whole(value, name, most = 1_000_000, least = 0) {
  need(
    Number.isInteger(value) && least <= value && value <= most,
    `${name} ${value} is not an integer from ${least} to ${most}: get it again`,
  );
  return value;
}

/**
 * An object's values, if it has these fields and no other.
 *
 * @param {any} value
 * @param {string} names Separated by spaces.
 * @param {string} what
 */
export function fields(value, names, what) {
  const [found, wanted] = [Object.keys(value), names.split(" ")];
  const right = found.length === wanted.length && found.every((name) => wanted.includes(name));
  need(right, `${what} has the fields ${found}, not ${names}: get it again`);
  return value;
}

/**
 * Run a reader. What JavaScript raises while it reads what is missing, or of another kind, becomes
 * exit code 3.
 *
 * @template T
 * @param {() => Promise<T>} read
 * @returns {Promise<T>}
 */
export async function reading(read) {
  try {
    return await read();
  } catch (error) {
    const kinds = ["TypeError", "RangeError", "SyntaxError", "InvalidCharacterError"]; // of `atob`
    if (!kinds.includes(/** @type {any} */ (error)?.name)) throw error;
    throw new Refused(`the file is malformed (${error}): get it again`, 3, error);
  }
}
