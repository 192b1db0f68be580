"""The page in a real Chromium, with a real model, real packets and onnxruntime-web."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from conftest import Fleet
from forge import Draft
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from site_kit import served
from sklearn.datasets import load_digits

from sdlora_edge.device import Device
from sdlora_edge.formats import signing
from sdlora_edge.inputs.image import Preprocessing

pytestmark = pytest.mark.debian
T = TypeVar("T")
NASTY = "<img src=x onerror=document.title='owned'>.sdlora"
DROP = """
const transfer = new DataTransfer();
for (const [name, bytes] of Object.entries(arguments[0])) {
  transfer.items.add(new File([Uint8Array.from(bytes)], name));
}
for (const kind of ["dragover", "drop"]) {
  const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
  document.body.dispatchEvent(new DragEvent(kind, options));
}
"""
LOGITS = """
const [files, done] = arguments;
(async () => {
  const base = new URL("/web/", location);
  const load = (name) => import(new URL(name, base));
  const ort = await load("node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs");
  const { IndexedDbStore } = await load("src/browser.js");
  const { decode } = await load("src/decode.js");
  const { onnxEngine } = await load("src/engine.js");
  const { Device } = await load("src/index.js");
  const engine = onnxEngine(ort), found = [];
  const seen = { ...engine, run: async (...words) => {
    const outputs = await engine.run(...words);
    found.push([...outputs.logits]);
    return outputs;
  } };
  const device = await Device.open(new IndexedDbStore("sdlora-edge"), seen);
  found.length = 0; // those of the canary
  for (const file of files) await device.predict(await decode(await (await fetch(file)).blob()));
  return found;
})().then(done, (error) => done(String(error)));
"""
CONTRASTS = """
const number = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const color = number(getComputedStyle(e).backgroundColor);
    if (color[3] !== 0) return color;
  }
  return [255, 255, 255];
};
return [...document.querySelectorAll("body *")]
  .filter((e) => e.checkVisibility() && !e.closest(":disabled, .drop:has(:disabled), .unseen"))
  .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
  .map((e) => {
    const [a, b] = [light(number(getComputedStyle(e).color)), light(behind(e))];
    return [e.textContent, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  });
"""
CARDS = """
return [...document.querySelectorAll(".answer")].map((card) => {
  const text = (selector) => card.querySelector(selector)?.textContent ?? "";
  const all = (selector) => [...card.querySelectorAll(selector)].map((e) => e.textContent);
  return { name: text(".name"), verdict: text(".verdict"), was: text(".was"),
    facts: text(".facts"), classes: all(".shares [title]"), percent: all(".percent") };
});
"""


@dataclass(frozen=True)
class Page:
    driver: webdriver.Chrome
    url: str

    def open(self, query: str = "") -> None:
        self.driver.get(f"{self.url}/web/{query}")

    def until(self, what: Callable[[], T]) -> T:
        wait = WebDriverWait(self.driver, 30, 0.05, [StaleElementReferenceException])
        return wait.until(lambda _: what())

    def text(self, selector: str) -> str:
        return self.driver.find_element(By.CSS_SELECTOR, selector).text

    def texts(self, selector: str) -> list[str]:
        return [e.text for e in self.driver.find_elements(By.CSS_SELECTOR, selector)]

    def choose(self, name: str, *files: Path) -> None:
        self.driver.find_element(By.ID, name).send_keys("\n".join(map(str, files)))

    def opened(self) -> None:
        """With the fleet's bundle."""
        self.open("?bundle=/bundle/")
        self.until(lambda: self.text("#state"))

    def answers(self, count: int) -> dict[str, dict[str, Any]]:
        """{name of the file: what its card shows}, once there are as many."""

        def found() -> list[dict[str, Any]]:
            cards: list[dict[str, Any]] = self.driver.execute_script(CARDS)
            return cards if sum(bool(card["verdict"]) for card in cards) == count else []

        return {card["name"]: card for card in self.until(found)}

    def logged(self, count: int) -> str:
        """The newest line about an update, once there are as many."""
        self.until(lambda: len(self.texts("#log li")) == count)
        return self.texts("#log li")[0]


@pytest.fixture
def page(browser: webdriver.Chrome, url: str, web_bundle: Path) -> Page:
    """Without a device, and without the page's cache."""
    browser.get(f"{url}/web/icon.svg")
    browser.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": url, "storageTypes": "all"})
    browser.get_log("browser")
    return Page(browser, url)


@pytest.fixture(scope="module")
def twin(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Device]:
    """A Python device that has applied the first packets."""

    def made(packets: int) -> Device:
        store = tmp_path_factory.mktemp("twin") / "store"
        device = Device.init(fleet.bundle, store)
        for packet in fleet.packets[:packets]:
            device.apply(packet)
        return device

    return made


@pytest.fixture(scope="module")
def photos(site: Path, twin: Callable[[int], Device]) -> list[Path]:
    """Handwritten digits: two of classes that the bundle knows, two of the first packet's."""
    before, after = twin(0), twin(1)
    known = set(before.status().classes)
    fresh = set(after.status().classes) - known
    digits = load_digits()
    folder = site / "photos"
    folder.mkdir()
    found: dict[str, list[Path]] = {"known": [], "fresh": []}
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target)):
        image = Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((120, 90 + i % 5))
        kind = "known" if str(label) in known else "fresh" if str(label) in fresh else ""
        if kind and len(found[kind]) < 2 and after.predict(image).label == str(label):
            found[kind].append(folder / f"{kind}-{i}.{'png' if i % 2 else 'jpg'}")
            image.save(found[kind][-1])
    assert [len(files) for files in found.values()] == [2, 2]
    return [*found["known"], *found["fresh"]]


def like(device: Device, photos: list[Path], shown: dict[str, dict[str, Any]]) -> None:
    """The page's cards say what a Python device answers."""
    for photo in photos:
        card, right = shown[photo.name], device.predict(photo, top=3)
        assert card["verdict"] == (right.label if right.known else "Unknown")
        assert card["classes"] == [name for name, _ in right.top]
        for percent, (_, probability) in zip(card["percent"], right.top):
            assert abs(float(percent.rstrip("%")) - 100 * probability) <= 0.51
        assert f"Generation {right.generation}." in card["facts"]
        assert f"Score {right.score:.2f}" in card["facts"]


def test_a_browser_learns_a_class_from_a_packet(
    page: Page, fleet: Fleet, photos: list[Path], twin: Callable[[int], Device]
) -> None:
    page.opened()
    page.choose("image-files", *photos)
    like(twin(0), photos, page.answers(4))
    page.choose("packet-files", fleet.packets[0])
    assert page.logged(1).startswith("Applied")
    page.until(lambda: all("Generation 2" in c["facts"] for c in page.answers(4).values()))
    shown, after = page.answers(4), twin(1)
    like(after, photos, shown)
    fresh = after.status().classes[-2:]
    for photo in photos[2:]:
        assert shown[photo.name]["verdict"] in fresh
        assert shown[photo.name]["was"].startswith("before the update: ")
    assert page.texts("#classes .new") == list(fresh)
    assert page.text("#said").split(": ")[0] in shown, "a screen reader is told of the change"
    assert f"New classes: {', '.join(fresh)}." in page.text("#log")
    assert page.driver.get_log("browser") == [], "the policy blocks nothing of ours"


def test_logits_are_those_of_the_python_device(
    page: Page, fleet: Fleet, photos: list[Path], twin: Callable[[int], Device]
) -> None:
    page.opened()
    page.choose("packet-files", *fleet.packets)
    page.logged(len(fleet.packets))
    paths = [f"/photos/{photo.name}" for photo in photos]
    found = page.driver.execute_async_script(LOGITS, paths)
    assert isinstance(found, list), found
    device = twin(len(fleet.packets))
    prepare = Preprocessing.from_manifest(device.bundle.manifest.preprocessing)
    right = device.logits(prepare.arrays(np.stack([prepare.pixels(p) for p in photos])))
    difference = float(np.abs(np.array(found) - right).max())
    print(f"largest difference of a logit: {difference:.1e}")
    assert difference <= 1e-4


def test_it_survives_reload_and_works_offline(
    browser: webdriver.Chrome, site: Path, web_bundle: Path, fleet: Fleet, photos: list[Path]
) -> None:
    with served(site) as url:
        page = Page(browser, url)
        page.opened()
        page.choose("packet-files", fleet.packets[0])
        page.logged(1)
        state = page.text("#state")
        page.until(lambda: page.text("#offline") == "Works offline")
    browser.execute_cdp_cmd("Network.clearBrowserCache", {})
    page.open()  # the server is gone
    page.until(lambda: page.text("#state") == state)
    page.choose("image-files", photos[3])
    (card,) = page.answers(1).values()
    assert card["verdict"] in page.texts("#classes li")[-2:]
    page.choose("packet-files", fleet.packets[1])
    assert page.logged(1).startswith("Applied")


def forged(fleet: Fleet, folder: Path) -> list[tuple[Path, str, str]]:
    """(packet, title of its line in the log, a part of the reason)."""
    thief = signing.load_signer(signing.new_key("thief", folder / "thief")[0])
    other, cut = folder / NASTY, folder / "cut.sdlora"
    other.write_bytes(Draft(fleet.packets[0]).sealed(thief))
    data = bytearray(fleet.packets[0].read_bytes())
    data[-9] ^= 1
    cut.write_bytes(data)
    return [
        (other, "Refused: not trusted (exit code 4)", "trusted keys have signed"),
        (cut, "Refused: damaged (exit code 3)", "get the packet again"),
        (fleet.packets[1], "Refused: not for this device (exit code 5)", ""),
    ]


def test_what_is_refused_says_why(page: Page, fleet: Fleet, tmp_path: Path) -> None:
    page.opened()
    state, title = page.text("#state"), page.driver.title
    for number, (packet, heading, reason) in enumerate(forged(fleet, tmp_path), 1):
        content = {packet.name: list(packet.read_bytes())}
        page.driver.execute_script(DROP, content)
        line = page.logged(number)
        assert line.splitlines()[:2] == [heading, packet.name]
        assert reason in line
        assert "The model has not changed." in line
        assert page.text("#state") == state
    assert page.driver.title == title
    assert not page.driver.find_elements(By.CSS_SELECTOR, "#log img")
    page.choose("packet-files", fleet.packets[0])
    page.logged(4)
    page.choose("packet-files", fleet.packets[0])
    assert page.logged(5).startswith("Nothing to do")


def test_what_is_no_image_and_what_is_nothing_at_all(page: Page, tmp_path: Path) -> None:
    page.opened()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    (tmp_path / "notes.txt").write_text("notes")
    page.choose("image-files", tmp_path / "broken.png")
    assert "save it as JPEG or PNG" in page.answers(1)["broken.png"]["verdict"]
    page.driver.execute_script(DROP, {"notes.txt": [1]})
    assert "notes.txt is no image" in page.until(lambda: page.text("#problem"))


def test_a_bundle_from_a_folder(page: Page, web_bundle: Path) -> None:
    page.open()
    page.driver.execute_script("document.getElementById('bundle-url').value = '/nothing'")
    page.driver.find_element(By.CSS_SELECTOR, "#bundle-form button").click()
    assert "/nothing/manifest.json answers 404" in page.until(lambda: page.text("#problem"))
    page.choose("bundle-files", web_bundle)
    page.until(lambda: page.text("#state"))
    assert page.text("#problem") == ""
    page.driver.find_element(By.CSS_SELECTOR, "#again summary").click()
    page.driver.find_element(By.ID, "forget").click()
    page.until(lambda: page.driver.find_element(By.ID, "bundle-form").is_displayed())
    page.open()
    page.until(lambda: page.driver.find_element(By.ID, "bundle-form").is_displayed())


def test_a_damaged_bundle_leaves_no_device(page: Page, web_bundle: Path, tmp_path: Path) -> None:
    import shutil

    damaged = shutil.copytree(web_bundle, tmp_path / "damaged")
    data = bytearray((damaged / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "weights.safetensors").write_bytes(data)
    page.open()
    page.choose("bundle-files", damaged)
    assert "weights.safetensors is not the file" in page.until(lambda: page.text("#problem"))
    page.open()
    assert page.driver.find_element(By.ID, "bundle-form").is_displayed()


def test_the_camera_answers_until_it_is_switched_off(page: Page) -> None:
    page.opened()
    button = page.driver.find_element(By.ID, "camera")
    button.send_keys(Keys.SPACE)
    page.until(lambda: "Generation 1." in page.text("#live-answer"))
    assert button.get_attribute("aria-pressed") == "true"
    button.send_keys(Keys.SPACE)
    page.until(lambda: not page.driver.find_element(By.ID, "live").is_displayed())


def test_the_keyboard_reaches_everything_and_everything_has_a_name(page: Page) -> None:
    page.opened()
    reached = []
    for _ in range(5):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        active = page.driver.switch_to.active_element
        reached.append(active.get_attribute("id") or active.tag_name)
    assert reached[:4] == ["image-files", "camera", "packet-files", "summary"]
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nameless = [
        node["role"]["value"]
        for node in nodes
        if any(p["name"] == "focusable" and p["value"]["value"] for p in node.get("properties", []))
        and not node.get("name", {}).get("value")
        and node["role"]["value"] != "RootWebArea"
    ]
    assert nameless == []


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_clipped_or_pale(
    page: Page, fleet: Fleet, photos: list[Path], width: int, dark: bool, tmp_path: Path
) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.opened()
        long = tmp_path / f"{'a-name-without-any-space-' * 5}.png"
        Image.open(photos[0]).save(long)
        page.choose("image-files", *photos, long)
        page.answers(5)
        page.choose("packet-files", fleet.packets[0])
        page.logged(1)
        page.driver.execute_script(DROP, {NASTY: [1, 2, 3]})
        page.logged(2)
        wide = page.driver.execute_script("return document.documentElement.scrollWidth")
        out = page.driver.execute_script(
            "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.unseen') &&"
            " e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert (wide <= width, out) == (True, [])
        contrasts = page.driver.execute_script(CONTRASTS)
        assert len(contrasts) > 30
        assert [text for text, contrast in contrasts if contrast < 4.5] == []
        background = "return getComputedStyle(document.body).backgroundColor"
        assert (page.driver.execute_script(background) == "rgb(17, 20, 24)") is dark
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
