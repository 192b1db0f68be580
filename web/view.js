/** What the page shows. Names come from packets and files: they become text, never markup. */

/**
 * @typedef {{known: boolean, score: number, threshold: number | null, generation: number,
 *   top: {class: string, probability: number}[]}} Prediction
 */

const percent = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 0 });

/**
 * @param {string} tag
 * @param {Record<string, string>} [attributes] `text` is the content.
 * @param {...Node} children
 * @returns {HTMLElement}
 */
export function element(tag, { text = "", ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(text, ...children);
  return made;
}

/** @param {Prediction} prediction */
export function verdict({ known, top }) {
  return known ? top[0].class : "Unknown";
}

/** In words, for a screen reader. @param {Prediction} prediction */
export function spoken({ known, top }) {
  const [{ class: name, probability }] = top;
  const share = percent.format(probability);
  return known ? `${name}, ${share}` : `unknown; the nearest class is ${name}`;
}

/**
 * @param {Prediction} prediction
 * @param {string} was The verdict before an update; empty if there was none.
 */
export function answer(prediction, was) {
  const { known, top, score, threshold, generation } = prediction;
  const bars = top.map(({ class: name, probability }) => {
    const fill = element("i");
    fill.style.transform = `scaleX(${probability})`;
    return element(
      "li",
      {},
      element("span", { text: name, title: name }),
      element("span", { class: "percent", text: percent.format(probability) }),
      element("span", { class: "bar", "aria-hidden": "true" }, fill),
    );
  });
  const limit = threshold === null ? "every image is known" : `known from ${threshold.toFixed(2)}`;
  const facts = `Score ${score.toFixed(2)}, ${limit}. Generation ${generation}.`;
  return element(
    "div",
    { class: known ? "known" : "unknown" },
    element("p", { class: "verdict", text: verdict(prediction) }),
    ...(was ? [element("p", { class: "was", text: `before the update: ${was}` })] : []),
    element("ul", { class: "shares" }, ...bars),
    element("p", { class: "facts", text: facts }),
  );
}

/**
 * @param {string} kind "taken", "refused" or "same".
 * @param {string} title
 * @param {...string} lines
 */
export function logged(kind, title, ...lines) {
  return element(
    "li",
    { class: kind },
    element("b", { text: title }),
    ...lines.filter(Boolean).map((text) => element("small", { text })),
  );
}
