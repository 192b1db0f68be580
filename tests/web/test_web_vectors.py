"""The test vectors and their sabotages in a real browser: its WebCrypto, its numbers, its modules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from site_kit import ROOT, WEB

pytestmark = pytest.mark.debian
SCRIPT = """
const [folder, name, done] = [...arguments];
const kept = (window.kept ??= {}); // from one script to the next
const read = (path) => (kept[path] ??= (async () => {
  const answer = await fetch(`/vectors/${path}`);
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return new Uint8Array(await answer.arrayBuffer());
})());
const load = (module) => import(`/${folder}/${module}`);
const run = async () => {
  const { readings, wrong } = await import("/web/test/vectors.js");
  const { failure, sabotages } = await import("/web/test/sabotages.js");
  %s
};
run().then(done, (error) => done(`error: ${error.stack}`));
"""
VECTORS = """
  const having = await readings(read, load), found = {};
  for (const vector of having.index.vectors) found[vector.name] = await wrong(vector, having);
  return found;
"""
SABOTAGES = """
  const sources = {};
  for (const file of name) sources[file] = await (await fetch(`/web/src/${file}.js`)).text();
  return sabotages(sources).map(({ about, sources: all }) => {
    const [file] = name.filter((one) => all[one] !== sources[one]);
    return [about, file, all[file]];
  });
"""
FAILURE = "return failure(await readings(read, load));"


@pytest.fixture(scope="module")
def page(browser: webdriver.Chrome, url: str) -> webdriver.Chrome:
    browser.get(f"{url}/web/icon.svg")
    return browser


def result(page: webdriver.Chrome, body: str, folder: str = "web/src", name: Any = None) -> Any:
    found = page.execute_async_script(SCRIPT % body, folder, name)
    assert not str(found).startswith("error: "), found
    return found


def test_every_vector_passes(page: webdriver.Chrome) -> None:
    found = result(page, VECTORS)
    index = json.loads((ROOT / "tests" / "vectors" / "vectors.json").read_text())
    assert found.keys() == {vector["name"] for vector in index["vectors"]}
    assert {name: problem for name, problem in found.items() if problem} == {}


def test_every_sabotage_is_caught(page: webdriver.Chrome, site: Path) -> None:
    modules = sorted(path.stem for path in (WEB / "src").glob("*.js"))
    sabotages = result(page, SABOTAGES, name=modules)
    assert len(sabotages) > 24
    missed = []
    for number, (about, module, text) in enumerate(sabotages):
        folder = site / "sabotaged" / str(number)
        shutil.copytree(WEB / "src", folder)
        (folder / f"{module}.js").write_text(text)
        if not result(page, FAILURE, f"sabotaged/{number}"):
            missed.append(about)
    assert missed == []
    print(f"{len(sabotages)} sabotages are caught")
