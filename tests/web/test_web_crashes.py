"""A browser that is killed while a packet is applied: the device has the old state or the new one."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import debian
import pytest
from selenium import webdriver

pytestmark = pytest.mark.debian
POINTS = {
    "put 1": {1},
    "put 2": {1},
    "2 puts": {1},
    "racing 0": {1, 2},
    "racing 0.003": {1, 2},
    "racing 0.01": {1, 2},
    "complete": {2},
}
"""{when the browser is killed: the tasks that its device may be at then}"""
WAKE = """
const done = arguments[0];
const load = (name) => import(`/web/${name}.js`);
const run = async () => {
  const { network } = await load("test/vectors");
  const { Device, openBundle } = await load("src/index");
  const { IndexedDbStore, urlReader } = await load("src/browser");
  const engine = network(await load("src/encoding"));
  const store = new IndexedDbStore("killed");
  const packet = async (name) =>
    new Uint8Array(await (await fetch(`/vectors/packets/${name}.sdlora`)).arrayBuffer());
  if (!(await store.exists())) {
    await Device.init(await openBundle(urlReader("/vectors/bundles/fp16")), store);
    await (await Device.open(store, engine)).apply(await packet("1"));
  }
  const device = await Device.open(store, engine);
  const woken = device.status();
  const next = await packet("2");
  const again = { allowOlder: true };
  if (woken.task === 1) await device.apply(next, again);
  const after = device.status();
  await device.rollback();
  window.applyAgain = () => device.apply(next, again);
  return [woken, after];
};
run().then(done, (error) => done(String(error.stack)));
"""
TRAP = """
const [point, url] = arguments;
const [kind, wait] = point.split(" ");
const kill = () => { // never comes back
  const request = new XMLHttpRequest();
  request.open("POST", url, false);
  request.send();
};
const { put } = IDBObjectStore.prototype, { transaction } = IDBDatabase.prototype;
let puts = 0;
IDBObjectStore.prototype.put = function (...given) {
  if (point === `put ${++puts}`) kill();
  const request = put.apply(this, given);
  if (point === `${puts} puts`) kill();
  if (kind === "racing" && puts === 2) fetch(`${url}${wait}`, { method: "POST" });
  return request;
};
IDBDatabase.prototype.transaction = function (...given) {
  const made = transaction.apply(this, given);
  if (point === "complete" && given[1] === "readwrite") made.addEventListener("complete", kill);
  return made;
};
window.applyAgain();
"""


def descendants(pid: int) -> list[int]:
    with contextlib.suppress(OSError):  # it has ended
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [one for child in map(int, children) for one in (child, *descendants(child))]
    return []


@contextlib.contextmanager
def killer(pid: int) -> Iterator[tuple[str, threading.Event]]:
    """A URL: whoever posts to it has everything below a process killed, after the seconds named."""
    dead = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            time.sleep(float(urlsplit(self.path).path[1:] or 0))
            for one in descendants(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
            dead.set()

        def log_message(self, *words: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", dead
        finally:
            server.shutdown()
            thread.join()


def woken(browser: webdriver.Chrome, url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(status of the device when it was opened, status once it has applied packet 2)."""
    browser.set_script_timeout(60)
    browser.get(f"{url}/web/icon.svg")
    found = browser.execute_async_script(WAKE)
    assert isinstance(found, list), found
    return found[0], found[1]


def test_a_browser_that_is_killed_while_it_applies_a_packet(url: str, tmp_path: Path) -> None:
    profile = f"user-data-dir={tmp_path / 'profile'}"
    allowed, seen = {1}, set()
    for point, later in [*POINTS.items(), ("", {0})]:
        with debian.chromium(profile) as browser:
            status, after = woken(browser, url)
            assert (status["damage"], status["task"] in allowed) == ("", True), (point, status)
            assert (after["damage"], after["task"]) == ("", 2)
            seen.add(status["task"])
            if point:
                with killer(browser.service.process.pid) as (place, dead):
                    with contextlib.suppress(Exception):  # of a browser that is gone
                        browser.execute_script(TRAP, point, place)
                    assert dead.wait(30), point
        allowed = later
    assert seen == {1, 2}
