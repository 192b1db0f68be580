import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { cp, mkdir, mkdtemp, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { test } from "node:test";

import { FIXTURE } from "./folders.js";

const GUIDE = fileURLToPath(new URL("../../docs/guides/javascript.md", import.meta.url));
const WEB = fileURLToPath(new URL("..", import.meta.url));

test("the guide's lines for Node run", async () => {
  const folder = await mkdtemp(join(tmpdir(), "sdlora-edge-guide-"));
  const [, lines] = /** @type {string[]} */ ((await readFile(GUIDE, "utf8")).match(/```js\n(.*?)```/s));
  const { packets } = JSON.parse(await readFile(`${FIXTURE}expected.json`, "utf8"));
  await cp(`${FIXTURE}fp32`, join(folder, "web-bundle"), { recursive: true });
  await cp(FIXTURE + packets[0], join(folder, "1.sdlora"));
  await mkdir(join(folder, "node_modules"));
  await symlink(join(WEB, "node_modules", "onnxruntime-node"), join(folder, "node_modules", "onnxruntime-node"));
  await symlink(WEB, join(folder, "node_modules", "sdlora-edge"));
  await writeFile(join(folder, "first.mjs"), lines);
  const shown = execFileSync(process.execPath, ["--no-warnings", "first.mjs"], { cwd: folder, encoding: "utf8" });
  assert.match(shown, /task: 1/);
  assert.match(shown, /probability/);
  await rm(folder, { recursive: true });
});
