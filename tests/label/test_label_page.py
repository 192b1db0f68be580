"""The page of `sdlora-edge label` in a real Chromium: with the mouse, with the keyboard alone, narrow and wide, light and dark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import debian
import pytest
from conftest import Fleet, snapshot
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait
from test_labelling import NASTY, Served, serving, unknown

from sdlora_edge.label.board import Written

pytestmark = pytest.mark.debian


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with debian.chromium("disable-gpu", "window-size=1400,1000") as found:
        yield found


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / ("new_images" * 8)


@pytest.fixture
def page(
    browser: webdriver.Chrome, fleet: Fleet, tmp_path: Path, out: Path
) -> Iterator[tuple[webdriver.Chrome, Served]]:
    folder = unknown(tmp_path / "unknown")
    (folder / "a" / "0.png").rename(folder / "a" / NASTY)
    with serving(folder, out, fleet) as served:
        browser.get(served.url)
        yield browser, served


def waited(browser: webdriver.Chrome, done: Callable[[webdriver.Chrome], object]) -> None:
    WebDriverWait(browser, 10, poll_frequency=0.05).until(done)


def click(browser: webdriver.Chrome, identifier: str) -> None:
    """As a person does, who scrolls until the element is not under the bar."""
    found = browser.find_element(By.ID, identifier)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
    found.click()


def said(browser: webdriver.Chrome) -> str:
    return browser.execute_script("return document.querySelector('#said').textContent")


def test_a_person_sorts_images_without_a_page_that_jumps(
    page: tuple[webdriver.Chrome, Served], out: Path
) -> None:
    browser, served = page
    browser.get_log("browser")
    browser.execute_script("window.same = true")
    for i in (0, 1, 2):
        click(browser, f"image-{i}")
    assert browser.find_element(By.ID, "count").text == "3 selected"
    Select(browser.find_element(By.ID, "to")).select_by_visible_text("a new group")
    click(browser, "move")
    waited(browser, lambda b: said(b) == "Moved 3 images.")
    assert browser.find_element(By.ID, "count").text == "none selected"
    name = browser.find_element(By.XPATH, "//section[.//*[@id='image-0']]//input[@list]")
    name.send_keys("gear", Keys.TAB)
    waited(
        browser, lambda b: b.find_elements(By.XPATH, "//option[.='gear' or contains(., ': gear')]")
    )
    last = browser.find_element(By.XPATH, "//section[.//*[@id='image-5']]//button[@class='all']")
    click(browser, str(last.get_attribute("id")))
    click(browser, "throw")
    waited(browser, lambda b: said(b).startswith("Threw away"))
    click(browser, "write")
    waited(browser, lambda b: said(b).startswith("Wrote"))
    assert "gear 3" in said(browser)
    assert browser.execute_script("return window.same"), "it was one page all the time"
    assert len(snapshot(out)) == 3
    click(browser, "end")
    waited(browser, lambda _: served.ended)
    assert isinstance(served.ended[0], Written)
    assert served.ended[0].classes == {"gear": 3}
    assert browser.get_log("browser") == [], "the policy blocks nothing of ours"


def test_the_keyboard_alone_is_enough(page: tuple[webdriver.Chrome, Served], out: Path) -> None:
    browser, _ = page
    keys = webdriver.ActionChains

    def reach(test: str) -> None:
        """Press Tab until the focused element fits."""
        for _ in range(60):
            keys(browser).send_keys(Keys.TAB).perform()
            if browser.execute_script(f"const e = document.activeElement; return {test}"):
                outline = "getComputedStyle(e.closest('.tile') ?? e).outlineStyle"
                assert browser.execute_script(
                    f"const e = document.activeElement; return {outline}"
                ) in ("solid", "auto"), "one sees where the focus is"
                return
        raise AssertionError(f"Tab does not reach {test}")

    reach("e.name?.startsWith('name-')")
    keys(browser).send_keys("hook", Keys.ENTER).perform()
    waited(browser, lambda b: b.find_elements(By.XPATH, "//p[contains(., 'A new class')]"))
    assert browser.execute_script("return document.activeElement.value") == "hook"
    reach("e.name === 'image'")
    keys(browser).send_keys(Keys.SPACE).perform()
    assert browser.find_element(By.ID, "count").text == "1 selected"
    reach("e.id === 'throw'")
    keys(browser).send_keys(Keys.ENTER).perform()
    waited(browser, lambda b: said(b).startswith("Threw away 1 image"))
    reach("e.id === 'write'")
    keys(browser).send_keys(Keys.SPACE).perform()
    waited(browser, lambda b: said(b).startswith("Wrote"))
    assert list(out.iterdir()) == [out / "hook"]


def test_everything_has_a_name_and_nothing_of_a_file_becomes_markup(
    page: tuple[webdriver.Chrome, Served],
) -> None:
    browser, served = page
    nameless = browser.execute_script(
        """
        return [...document.querySelectorAll("button, select, input, img")].filter(e =>
          !(e.labels?.length || e.ariaLabel || e.alt || e.textContent.trim())).map(e => e.outerHTML);
        """
    )
    assert nameless == []
    assert browser.execute_script("return document.querySelectorAll('script').length") == 1
    assert browser.find_elements(By.XPATH, f"//img[@alt='{NASTY}']")
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    origin = "/".join(served.url.split("/")[:3])
    assert all(url.startswith((served.url, f"{origin}/favicon.ico")) for url in loaded), loaded
    waited(
        browser,
        lambda b: b.execute_script(
            "return [...document.images].every(i => i.complete && i.naturalWidth > 0)"
        ),
    )


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_clipped_or_too_wide(
    page: tuple[webdriver.Chrome, Served], width: int, dark: bool
) -> None:
    browser, _ = page
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.refresh()
    found = browser.execute_script(
        """
        const out = [...document.querySelectorAll("main *")].filter(e =>
          e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1);
        return {wide: document.documentElement.scrollWidth, out: out.map(e => e.outerHTML.slice(0, 80)),
          page: getComputedStyle(document.body).backgroundColor};
        """
    )
    assert found["wide"] <= width
    assert found["out"] == []
    assert (found["page"] == "rgb(17, 20, 24)") is dark


def test_the_page_works_without_scripts(page: tuple[webdriver.Chrome, Served], out: Path) -> None:
    browser, _ = page
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.refresh()
        browser.find_element(By.CSS_SELECTOR, "input[list]").send_keys("gear")
        click(browser, "write")
        assert browser.find_element(By.ID, "said").text.startswith("Wrote")
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert list(out.iterdir()) == [out / "gear"]
