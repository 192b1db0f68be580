"""A fleet that follows a repository for weeks, with the real client, collector and driver.

Every device has a store of its own, a real model (micro_vit on ONNX Runtime, the smallest there is), a key, and python-tuf's
client. The repository is served by nginx on the loopback, reports go through mosquitto to the collector's inbox, and its
driver advances and pauses waves. Without nginx, Python's server takes its place; mosquitto must be there. Time is that of a
clock which the benchmark sets: each round is one look of every device that is online.

    1. Task 1 is rolled out in waves of 1, 10, 50 and 100 %. 30 % of the devices are offline until step 4.
    2. A week later task 2 is a packet whose canary fails on every device. The driver pauses it.
    3. A human aborts it, and rolls out a good packet of task 2.
    4. A week later the offline devices come back, and catch up.
    5. A thief with all online keys gives orders.

On the way: 2 % of the clocks stand at 1970, and 1 % are a year ahead until step 4. A sample of devices loses power in the
middle of a sync, at a different operation of the disk each. One more device downloads a bundle over a link that is cut
every 100 kB.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "fleet")]
import debian  # noqa: E402
import figures  # noqa: E402
from conftest import SMALL, Fleet, make_fleet  # noqa: E402
from fleet_kit import Clock, Made, made, served  # noqa: E402

from sdlora_edge.device.device import Device  # noqa: E402
from sdlora_edge.errors import SdloraError  # noqa: E402
from sdlora_edge.fleet.client import Client  # noqa: E402
from sdlora_edge.fleet.collector.database import Database  # noqa: E402
from sdlora_edge.fleet.collector.driver import Pace as DriverPace  # noqa: E402
from sdlora_edge.fleet.collector.driving import Driver  # noqa: E402
from sdlora_edge.fleet.collector.inbox import Inbox  # noqa: E402
from sdlora_edge.fleet.collector.registry import enroll  # noqa: E402
from sdlora_edge.fleet.collector.subscriber import Subscriber  # noqa: E402
from sdlora_edge.fleet.fetching import Fetcher  # noqa: E402
from sdlora_edge.fleet.identity import Changes, Identity, configure  # noqa: E402
from sdlora_edge.fleet.mqtt_link import Options  # noqa: E402
from sdlora_edge.fleet.pacing import Pace, abort, start  # noqa: E402
from sdlora_edge.fleet.provision import Source, init_from  # noqa: E402
from sdlora_edge.fleet.reporting import Reporter  # noqa: E402
from sdlora_edge.fleet.targets import Target  # noqa: E402
from sdlora_edge.formats import packet, signing  # noqa: E402
from sdlora_edge.formats.canonical import sha256  # noqa: E402
from sdlora_edge.inputs import canary  # noqa: E402
from sdlora_edge.storage import disk  # noqa: E402
from sdlora_edge.train.run import Run  # noqa: E402

CHANNEL, DAY, WEEK = "line-3", 86_400, 7 * 86_400
OFFLINE, BEHIND, AHEAD = 0.30, 0.02, 0.01
POLL = 300
"""seconds between two looks of a device, for bytes a week"""
OPERATIONS = ("write", "rename", "sync", "mkdir", "unlink")
"""of the disk, before one of which the power fails"""


class Cut(BaseException):
    """The power fails."""


@dataclass
class Round:
    """What some devices did in one round."""

    requests: int = 0
    received: int = 0
    idle: Counter[int] = field(default_factory=Counter)
    news: list[int] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    took: set[str] = field(default_factory=set)
    told: int = 0
    untold: int = 0
    cuts: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, other: Round) -> None:
        """Sum up what another process's devices did."""
        self.requests += other.requests
        self.received += other.received
        self.idle += other.idle
        self.news += other.news
        self.touched |= other.touched
        self.took |= other.took
        self.told += other.told
        self.untold += other.untold
        self.cuts += other.cuts
        self.errors += other.errors


def bad_packet(fleet: Fleet, out: Path) -> Path:
    """Task 2, signed as it must be, with a canary that no device can pass."""
    run = Run.open(fleet.run)
    logits = canary_logits(run, 2) + 1
    contents = packet.Contents(
        lineage=run.lineage,
        begin=run.states[1].digest,
        updates=(run.updates[1],),
        canary_seed=2,
        canary_logits=logits.astype("float32"),
    )
    signer = signing.load_signer(fleet.key)
    out.write_bytes(packet.build(contents, lambda payload: signing.sign(payload, [signer])))
    return out


def canary_logits(run: Run, task: int) -> Any:
    from sdlora_edge.export.parity import host_logits

    return host_logits(run, task, canary.inputs(task, run.preprocessing, 2))


def make_device(template: Path, store: Path, url: str, broker: str, root: bytes) -> Identity:
    """A device's store: the template's bundle by hard links, records and identity of its own."""
    store.mkdir()
    (store / "packets").mkdir()
    shutil.copytree(template / "bundle", store / "bundle", copy_function=os.link)
    for record in template.glob("generation.*.json"):
        shutil.copy(record, store)
    who = configure(store, Changes(channel=CHANNEL, url=url, report_to=(broker,)))
    Client(store).trust(root)
    return who


def look(
    stores: list[Path], clocks: dict[str, float], now: float, cuts: dict[str, int], seed: int
) -> Round:
    """One look of each of these devices, and a report of each that changed."""
    found, begin, chance = Round(), time.perf_counter(), random.Random(seed)  # noqa: S311
    for store in stores:
        one = partial(_look, store, now + clocks.get(store.name, 0.0), found)
        if store.name not in cuts:
            one()
            continue
        with contextlib.suppress(Cut), cut_at(cuts[store.name], chance):
            one()
        found.cuts += 1
        one()
    found.seconds = time.perf_counter() - begin
    return found


def _look(store: Path, now: float, found: Round) -> None:
    fetcher = Fetcher()
    try:
        done = Client(store, clock=lambda: max(0.0, now), fetcher=fetcher).sync()
    except SdloraError as error:
        found.errors[f"{type(error).__name__}: {str(error)[:60]}"] += 1
        done = None
    found.requests += fetcher.requests
    found.received += fetcher.received
    if done is None:
        return
    if not done.news:
        found.idle[fetcher.received] += 1
        return
    if done.applied or done.failures:
        found.touched.add(store.name)
        found.took |= {store.name} if done.applied else set()
        found.news.append(fetcher.received)
        for failure in done.failures:
            found.errors[f"packet refused, exit code {failure.code}"] += 1
        tell(store, found)


def tell(store: Path, found: Round) -> None:
    """Report to the broker."""
    client = Client(store)
    with Reporter(store, client.identity, Options.given(None, None, None)) as reporter:
        sent = reporter.report(Device.open(store).status())
    found.told += bool(sent and sent.delivered)
    found.untold += not (sent and sent.delivered)


@contextlib.contextmanager
def cut_at(operation: int, chance: random.Random) -> Iterator[None]:
    """The power fails before the n-th operation of the disk."""
    left, before = [operation], {name: getattr(disk, name) for name in OPERATIONS}

    def counted(real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Cut
        return real(*arguments, **more)

    for name, real in before.items():
        setattr(disk, name, partial(counted, real))
    try:
        yield
    finally:
        for name, real in before.items():
            setattr(disk, name, real)


class World:
    """The repository, its servers, the collector, and all devices."""

    def __init__(self, folder: Path, count: int, workers: int) -> None:
        self.folder, self.workers = folder, workers
        self.clock = Clock(float(int(time.time())))
        self.fleet = make_fleet(folder / "host", SMALL)
        self.site: Made = made(folder, self.clock)
        self.bad = bad_packet(self.fleet, folder / "bad.sdlora")
        self.publish(self.fleet.bundle, self.fleet.packets[0], self.bad)
        chance = random.Random(1)  # noqa: S311
        names = [f"{i:05d}" for i in range(count)]
        chance.shuffle(names)
        cut = int(count * OFFLINE)
        self.offline, rest = set(names[:cut]), names[cut:]
        self.names = sorted(names)
        behind, ahead = int(count * BEHIND), int(count * AHEAD)
        self.clocks = dict.fromkeys(rest[:behind], -1e10)
        self.clocks |= dict.fromkeys(rest[behind : behind + ahead], 365.0 * DAY)
        self.sample = rest[behind + ahead :][: max(10, count // 100)]
        self.requests = self.received = self.polls = 0
        self.told = self.cuts = 0
        self.idle: Counter[int] = Counter()
        self.news: list[int] = []
        self.seconds = 0.0
        self.rounds: list[dict[str, Any]] = []

    def publish(self, *files: Path) -> None:
        self.site.repository.publish(list(files), self.site.targets_keys, self.site.online)

    def target(self, path: Path) -> Target:
        digest = sha256(path.read_bytes())
        return next(t for t in self.site.repository.targets() if t.digest == digest)

    def stores(self) -> Path:
        return self.folder / "devices"

    def make_devices(self, url: str, broker: str) -> None:
        template = self.folder / "template"
        Device.init(self.fleet.bundle, template)
        self.stores().mkdir()
        identities = [
            make_device(template, self.stores() / name, url, broker, self.site.root)
            for name in self.names
        ]
        enroll(self.database, identities, self.clock())

    def round(self, what: str, cuts: dict[str, int] | None = None) -> Round:
        """Every device that is online looks once."""
        online = [self.stores() / n for n in self.names if n not in self.offline]
        parts = [online[i :: self.workers] for i in range(self.workers)]
        found, begin = Round(), time.perf_counter()
        with ProcessPoolExecutor(self.workers, get_context("fork")) as pool:
            jobs = [
                pool.submit(look, part, self.clocks, self.clock(), cuts or {}, i)
                for i, part in enumerate(parts)
            ]
            for job in jobs:
                found.add(job.result())
        seconds = time.perf_counter() - begin
        self.requests, self.received = (
            self.requests + found.requests,
            self.received + found.received,
        )
        self.polls += len(online)
        self.told, self.cuts = self.told + found.told, self.cuts + found.cuts
        self.seconds += seconds
        self.idle, self.news = self.idle + found.idle, self.news + found.news
        self.rounds.append(
            {
                "what": what,
                "devices": len(online),
                "touched": len(found.touched),
                "took": len(found.took),
                "requests": found.requests,
                "requests_per_s": round(found.requests / seconds),
                "errors": dict(found.errors.most_common(4)),
            }
        )
        print(self.rounds[-1], file=sys.stderr, flush=True)
        return found

    def settle(self, told: int) -> None:
        """Wait until the collector has every report that was delivered."""
        end = time.monotonic() + 60
        while self.inbox.stored < told and time.monotonic() < end:
            time.sleep(0.02)

    def drive(self) -> str:
        """The driver looks once; the newest step's status and wave."""
        self.settle(self.told)
        driver = Driver(
            self.database, self.site.path, self.site.keys["rollout"][0].parent, DriverPace(soak=0)
        )
        driver._repository = self.site.repository  # which has the benchmark's clock
        driver.drive(self.clock())
        step = self.site.repository.plan(CHANNEL).steps[-1]
        return f"{step.status} at {step.percent} %"

    def roll_out(self, path: Path, sequence: int) -> tuple[set[str], int]:
        """Waves until everybody may take a packet, or it is paused: who was touched, and rounds."""
        pace = Pace((1, 10, 50, 100), success=50, error=20)
        target = self.target(path)
        self.site.repository.pace(
            CHANNEL, lambda plan: start(plan, target, pace, self.clock()), self.site.online
        )
        touched: set[str] = set()
        for count in range(1, 13):
            self.clock.now += DAY / 4
            self.site.repository.refresh(self.site.online)
            cuts = {name: i % 40 for i, name in enumerate(self.sample)} if sequence == 1 else {}
            before = self.site.repository.plan(CHANNEL).steps[-1].percent
            found = self.round(f"task {sequence} at {before} %", cuts if before == 100 else {})
            touched |= found.touched
            state = self.drive()
            if state.startswith("paused") or before == 100:
                return touched, count
        raise SystemExit(f"the roll-out of task {sequence} did not end")


@contextlib.contextmanager
def servers(folder: Path, site: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(URL of the repository, URL of the broker, what they are)."""
    with contextlib.ExitStack() as running:
        if debian.found("nginx"):
            url, web = running.enter_context(debian.nginx(folder / "nginx", site)), "nginx"
        else:
            url, web = running.enter_context(served(site)).url, "Python's http.server"
        if not debian.found("mosquitto"):
            raise SystemExit("mosquitto is not here: install Debian's package")
        port = running.enter_context(debian.mosquitto(folder / "mosquitto"))
        yield url, f"mqtt://127.0.0.1:{port}", [web, "mosquitto"]


def cut_link(world: World, url: str) -> dict[str, Any]:
    """A bundle over a link that is cut every 100 kB."""

    class Weak(Fetcher):
        """The connection ends after 100 kB."""

        def _body(self, response: Any, begin: int) -> Iterator[bytes]:
            left = 100_000
            for chunk in super()._body(response, begin):
                yield chunk[:left]
                left -= len(chunk)
                if left <= 0:
                    raise OSError("the link was cut")

    fetcher = Weak(sleep=lambda seconds: None)
    store = world.folder / "weak"
    init_from(Source(url, world.site.root), store, fetcher, Changes(url=url))
    size = sum(f.stat().st_size for f in (store / "bundle").iterdir())
    return {"bundle_bytes": size, "received": fetcher.received, "requests": fetcher.requests}


def stolen(world: World) -> int:
    """Devices that change when a thief with all online keys points them at packets of his own."""
    from dataclasses import replace

    thief = Made(world.site.repository, {}, world.site.online)
    plan = world.site.repository.plan(CHANNEL)
    first = plan.steps[0]
    # The thief orders everybody back to the state of task 1, and asks for the aborted packet again.
    wild = replace(plan, steps=tuple(replace(s, status="running", wave=3) for s in plan.steps[:2]))
    thief.repository.set_plan(
        replace(wild, steps=(*wild.steps, replace(first, wave=3))), thief.online
    )
    before = {n: Client(world.stores() / n)._store.current().digests for n in world.names}
    world.round("a thief of the online keys gives orders")
    after = {n: Client(world.stores() / n)._store.current().digests for n in world.names}
    thief.repository.set_plan(plan, thief.online)
    return sum(before[name] != after[name] for name in world.names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    place = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108 - a place in memory
    with tempfile.TemporaryDirectory(dir=place) as name:
        world = World(Path(name), given.devices, given.workers)
        world.database = Database.open(f"sqlite:///{name}/fleet.db")
        world.inbox = Inbox(world.database, world.clock)
        with (
            servers(Path(name), world.site.path) as (url, broker, kinds),
            Subscriber(broker, world.inbox),
        ):
            values = lived(world, url, broker) | {"servers": kinds}
    command = f"python tests/bench/fleet.py --devices {given.devices}"
    print(figures.write("fleet", command, values, packages=("tuf", "onnxruntime", "paho-mqtt")))


def lived(world: World, url: str, broker: str) -> dict[str, Any]:
    """The steps above, and the figures of them."""
    count = len(world.names)
    begin = time.perf_counter()
    world.make_devices(url, broker)
    print(f"{count} devices made in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    good, rounds = world.roll_out(world.fleet.packets[0], 1)
    world.clock.now += WEEK
    world.site.repository.refresh(world.site.online)
    world.round("nothing new")
    bad, _ = world.roll_out(world.bad, 2)
    status = world.site.repository.plan(CHANNEL).steps[-1]
    world.round("the bad packet is paused")
    packet_digest = sha256(world.bad.read_bytes())
    world.site.repository.pace(
        CHANNEL, lambda plan: abort(plan, packet_digest, "bad", world.clock()), world.site.online
    )
    world.publish(world.fleet.packets[1])
    world.roll_out(world.fleet.packets[1], 2)
    world.clock.now += WEEK
    world.offline, world.clocks = set(), {n: c for n, c in world.clocks.items() if c < 0}
    world.site.repository.refresh(world.site.online)
    back = world.round("everybody is back, with the right year")
    last = world.round("nothing new")
    end = world.site.repository.plan(CHANNEL).steps[-1].to
    stuck = [
        name for name in world.names if Device.open(world.stores() / name).status().state != end
    ]
    changed = stolen(world)
    idle_bytes = max(world.idle)
    news = sorted(world.news)
    return {
        "devices": count,
        "idle_poll_bytes": idle_bytes,
        "idle_polls": sum(world.idle.values()),
        "idle_bytes_a_week": idle_bytes * WEEK // POLL,
        "news_bytes_per_device": news[len(news) // 2],
        "news_bytes_most": news[-1],
        "rounds_to_all": rounds,
        "bad_packet_share_touched": round(len(bad) / count, 4),
        "bad_packet_status": status.status,
        "bad_packet_reason": status.reason,
        "caught_up": len(back.took),
        "idle_after": sum(last.idle.values()),
        "stuck_devices": len(stuck),
        "power_cuts": world.cuts,
        "reports": world.inbox.stored,
        "refused_reports": sum(world.inbox.refused.values()),
        "requests": world.requests,
        "received_bytes": world.received,
        "requests_per_s": round(world.requests / world.seconds),
        "cut_link": cut_link(world, url),
        "catch_up_100_packets_s": catch_up(),
        "online_keys_stolen_devices_changed": changed,
        "cpu_s": round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), 1),
        "touched_by_the_good_packet": len(good),
        "rounds": world.rounds,
    }


def catch_up() -> float | None:
    """Seconds for 100 packets of ViT-B/16 in one go, as `make bench-device` measured them."""
    import json

    path = figures.FIGURES / "device.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found.get("apply_100_packets_s") if "apply_100_packets_one_by_one_s" in found else None


if __name__ == "__main__":
    main()
