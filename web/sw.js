/** The page without a network: its own files, kept at the first visit. A bundle is in the store. */

const CACHE = "sdlora-edge";
const ORT = "node_modules/onnxruntime-web/dist/";
const MODULES = [
  "accept", "browser", "bundle", "canary", "canonical", "check", "confidence", "container",
  "control", "decode", "device", "ed25519", "encoding", "engine", "image", "index", "merge",
  "task",
];
const FILES = [
  "./",
  "page.css",
  "page.js",
  "drops.js",
  "view.js",
  "icon.svg",
  "manifest.webmanifest",
  ...MODULES.map((name) => `src/${name}.js`),
  `${ORT}ort.wasm.bundle.min.mjs`,
  `${ORT}ort-wasm-simd-threaded.wasm`,
];

addEventListener("install", (event) => {
  skipWaiting();
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(FILES)));
});

addEventListener("activate", (event) => event.waitUntil(clients.claim()));

/** Newest first: a page and its modules must be of one version. */
async function answer(request) {
  const cache = await caches.open(CACHE);
  try {
    const found = await fetch(request);
    if (found.ok) await cache.put(request, found.clone());
    return found;
  } catch (error) {
    const kept = await cache.match(request, { ignoreSearch: true });
    if (kept) return kept;
    throw error;
  }
}

const own = new Set(FILES.map((name) => new URL(name, registration.scope).href));

addEventListener("fetch", (event) => {
  const { origin, pathname } = new URL(event.request.url);
  const isOwn = own.has(origin + pathname) || own.has(`${origin}${pathname.replace(/index\.html$/, "")}`);
  if (event.request.method === "GET" && isOwn) event.respondWith(answer(event.request));
});
