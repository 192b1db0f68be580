"""The dashboard in a real Chromium: what it shows, on narrow and wide pages, light and dark."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import debian
import pytest
from cameras import TOKEN, Camera, collector, digest, predicted
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from sdlora_edge.fleet.collector.database import Database
from sdlora_edge.fleet.collector.inbox import STORED, Inbox
from sdlora_edge.fleet.collector.registry import PROPOSED, Event, enroll, log_event
from sdlora_edge.fleet.sync_state import Failure

pytestmark = pytest.mark.debian
HOUR, DAY = 3600, 86_400
NASTY = "</title><script>document.title='owned'</script><img src=x onerror=alert(1)>"
LONG = "a-name-without-any-space-that-is-far-too-long-for-a-narrow-page-" * 3
COMMAND = (
    "sdlora-edge packet revoke --bundle BUNDLE --task 2 --revision 0 --key NAME --out r.sdlora"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collector's folder: thirty devices, three days, an update that half of them took."""
    path = tmp_path_factory.mktemp("dashboard")
    database = Database.open(f"sqlite:///{path / 'fleet.db'}")
    now = int(time.time())
    clock = now - 3 * DAY
    inbox = Inbox(database, lambda: clock)
    names = [NASTY, LONG[:200], "検査カメラ", *(f"camera {i}" for i in range(27))]
    cameras = [
        Camera(name, ("line-1", "line-2")[i % 2], ("canary",) if i < 4 else ())
        for i, name in enumerate(names)
    ]
    enroll(database, [c.identity for c in cameras], clock)
    for k in range(7):
        clock = now - 3 * DAY + k * (DAY // 2) + (3 * HOUR if k < 6 else -60)
        for i, one in enumerate(cameras[:-1]):
            if i == 20 and k > 2:
                continue  # it goes silent
            new = k > 3 and i < 15
            state = {"state": digest(str(new)), "task": 2 if new else 1}
            errors = (Failure(clock, 6, f"the canary differs {'x' * 200}"),) if i == 25 else ()
            counts = predicted(clock, 30 if new else 3, cat=50, dog=20, **{f"c{k}": 5})
            sealed = one.sealed(
                clock, predictions=counts, errors=errors, task_name=LONG[:150], **state
            )
            assert inbox.take(sealed).kind == STORED
    log_event(database, Event(PROPOSED, "sign it", "line-1", command=COMMAND), now)
    database.close()
    return path


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with collector(folder) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with debian.chromium("disable-gpu") as found:
        yield found


@pytest.fixture
def page(browser: webdriver.Chrome, url: str) -> webdriver.Chrome:
    """A browser that has logged in."""
    browser.get(f"{url}/login")
    if browser.find_elements(By.NAME, "token"):
        browser.find_element(By.NAME, "token").send_keys(TOKEN)
        browser.find_element(By.CSS_SELECTOR, "main button").click()
    return browser


def text(page: webdriver.Chrome, selector: str) -> str:
    return page.find_element(By.CSS_SELECTOR, selector).text


def shown_at(page: webdriver.Chrome, width: int, dark: bool = False) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def test_people_log_in_and_out(browser: webdriver.Chrome, url: str) -> None:
    browser.get(url)
    assert browser.current_url == f"{url}/login"
    browser.find_element(By.NAME, "token").send_keys("a wrong token of a test")
    browser.find_element(By.CSS_SELECTOR, "main button").click()
    assert "not the token" in text(browser, ".alarm")
    browser.find_element(By.NAME, "token").send_keys(TOKEN)
    browser.find_element(By.CSS_SELECTOR, "main button").click()
    assert (browser.current_url, text(browser, "#devices")) == (f"{url}/", "30")
    assert browser.execute_script("return document.cookie") == ""
    browser.find_element(By.CSS_SELECTOR, "header .quiet").click()
    browser.get(url)
    assert browser.current_url == f"{url}/login"


def test_the_fleet_is_seen_at_one_look(page: webdriver.Chrome, url: str) -> None:
    page.get(url)
    assert (text(page, "#devices"), text(page, "#failing"), text(page, "#silent")) == (
        ("30", "1", "1")
    )
    assert "exit code 6: the canary differs" in text(page, "#failures")
    assert "camera 22" in text(page, "#failures")
    assert text(page, "#jump").startswith("task 2 answers unknown 28.")
    assert "task 2: 15 devices, jump" in [
        found.get_attribute("textContent") for found in page.find_elements(By.CSS_SELECTOR, ".tag")
    ]
    assert COMMAND in text(page, ".events pre")
    assert len(page.find_elements(By.CSS_SELECTOR, ".part.c0")) > 3


def test_no_name_becomes_markup_and_nothing_is_loaded_from_elsewhere(
    page: webdriver.Chrome, url: str
) -> None:
    page.get_log("browser")
    for path in ("/", f"/devices/{Camera(NASTY).id}"):
        page.get(url + path)
        assert "owned" not in page.title.split()
        assert not page.find_elements(By.TAG_NAME, "img")
        assert NASTY in text(page, "body")
        urls = page.execute_script(
            "return performance.getEntriesByType('resource').map(e => e.name)"
        )
        assert urls
        assert all(one.startswith(url) for one in urls)
        assert page.get_log("browser") == [], "the policy blocks nothing of ours"


def test_filters_need_no_button(page: webdriver.Chrome, url: str) -> None:
    page.get(url)
    Select(page.find_element(By.NAME, "group")).select_by_visible_text("canary")
    webdriver.support.ui.WebDriverWait(page, 10).until(lambda p: text(p, "#devices") == "4")
    assert "group=canary" in page.current_url
    page.find_element(By.LINK_TEXT, "All devices").click()
    assert text(page, "#devices") == "30"


def test_a_device_has_a_page(page: webdriver.Chrome, url: str) -> None:
    page.get(url)
    page.find_element(By.LINK_TEXT, "検査カメラ").click()
    assert text(page, "h1").startswith("検査カメラ")
    assert "went from task 1 to task 2" in text(page, ".events")
    page.find_element(By.LINK_TEXT, "1 d").click()
    assert "days=1" in page.current_url


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_clipped_or_too_wide(
    page: webdriver.Chrome, url: str, width: int, dark: bool
) -> None:
    shown_at(page, width, dark)
    for path in ("/", f"/devices/{Camera(LONG[:200]).id}", "/devices/nobody"):
        page.get(url + path)
        found: dict[str, Any] = page.execute_script(
            """
            const wide = document.documentElement.scrollWidth;
            const out = [...document.querySelectorAll("main *, header *")].filter(e =>
              !e.closest(".scroll, svg, .short") && e.getBoundingClientRect().right > innerWidth + 1);
            const labels = [...document.querySelectorAll("svg.chart text")].filter(e => {
              const box = e.getBoundingClientRect(), card = e.closest("section").getBoundingClientRect();
              return box.width && (box.left < card.left || box.right > card.right);
            });
            return {wide, out: out.map(e => e.outerHTML.slice(0, 80)),
              labels: labels.map(e => e.textContent),
              page: getComputedStyle(document.body).backgroundColor};
            """
        )
        assert found["wide"] <= width
        assert (found["out"], found["labels"]) == ([], [])
        assert (found["page"] == "rgb(17, 20, 24)") is dark


def test_the_page_works_without_scripts(page: webdriver.Chrome, url: str) -> None:
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.get(f"{url}/?channel=line-1")
        assert text(page, "#devices") == "15"
        assert page.find_elements(By.CSS_SELECTOR, ".chart path")
    finally:
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
