"""A real Prometheus scrapes real servers while devices migrate, fail and die; then every expression has data.

One scenario for all tests here, about 25 s on an idle machine: `source` moves to `destination` as it should,
and back with a long downtime; `churn` is written faster than it is read; `victim` loses a migration, refuses
a stream, is written behind its server's back, and is killed at last; `broken` runs out of memory in a state
change.
"""

from __future__ import annotations

import re
import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from expressions import alerts, everything, panels
from promkit import Prometheus
from serverkit import RunningServer, ServerFactory, server_farm, short_folder, wait_until

from vfu_dev.bench.peers import free_port
from vfu_dev.builds import BuildError
from vfu_dev.client import ClientCommandError, VfioUserDevice
from vfu_dev.client.migrator import ClientOptions, ClientProgress, Migrator
from vfu_dev.sizes import parse_size
from vfu_dev.uapi import VFIO_PCI_BAR2_REGION_INDEX, DeviceState

PAGE = 4096
MOVED = ("source", "destination")  # the first with pre-copy, the second without
MEMORY = {"source": "32M", "destination": "32M", "churn": "32M", "victim": "8M", "broken": "1G"}
PRE_COPY_LIMIT, DOWNTIME_LIMIT = "vfu:pre_copy_limit:seconds", "vfu:downtime_limit:seconds"
# However busy the machine is, no migration that goes well is above these. Lower ones follow when it is over.
NO_LIMITS = {PRE_COPY_LIMIT: 1e6, DOWNTIME_LIMIT: 1e6}
# One scrape that takes too long is no server that is gone.
INTERVAL, HOLD = "500ms", "2s"


@dataclass
class Scenario:
    """What happened: when, and what Prometheus saw of it."""

    prometheus: Prometheus
    start: float
    end: float
    instances: dict[str, str]
    firing: set[tuple[str, str]]


def write_pages(device: VfioUserDevice, count: int, among: int, random: np.random.Generator) -> None:
    """Write `count` different pages of the first `among`, and look at each."""
    for page in random.choice(among, size=count, replace=False):
        device.region_write(VFIO_PCI_BAR2_REGION_INDEX, int(page) * PAGE, random.bytes(PAGE))
        device.region_read(VFIO_PCI_BAR2_REGION_INDEX, int(page) * PAGE, 8)


def migrate_there_and_back(
    prometheus: Prometheus, source: VfioUserDevice, destination: VfioUserDevice
) -> None:
    """Move with pre-copy and a guest that writes a little; then back in one piece, well above the limit."""
    random = np.random.default_rng(1)
    seen = False

    def ratio_is_seen() -> bool:
        """Say whether Prometheus has the ratio of this migration; the guest goes on more slowly meanwhile."""
        time.sleep(0.1)
        write_pages(source, 2, 4096, random)
        found = prometheus.query(panels()["Convergence / {{device}}"])
        return any(one["metric"]["device"] == "source" for one in found)

    def work(progress: ClientProgress) -> None:
        nonlocal seen
        if progress.phase != "pre-copy":
            return
        write_pages(source, 20, 4096, random)
        # Both rates are known by then. Otherwise PRE_COPY could be over before there was a scrape.
        if progress.precopy_bytes > 8 << 20 and not seen:
            seen = wait_until(ratio_is_seen, "Prometheus has the ratio of the source")

    first = Migrator(source, destination, ClientOptions(max_bandwidth=12_000_000), reporter=work).run()
    stops = iter([2 * first.downtime_seconds])

    def stand_still(progress: ClientProgress) -> None:
        """Stay in STOP_COPY for longer than the first move did, however slow that was."""
        if progress.phase == "stop-copy" and progress.stop_copy_bytes:
            time.sleep(next(stops, 0.0))

    options = ClientOptions(max_bandwidth=40_000_000, pre_copy=False)
    Migrator(destination, source, options, reporter=stand_still).run()
    assert next(stops, None) is None, "it stood still"


def churn(device: VfioUserDevice, stop: threading.Event) -> None:
    """Write about twice as fast as is read, in PRE_COPY, until told to stop; then cancel."""
    random = np.random.default_rng(2)
    chunk, half = 1 << 20, 16 << 20
    device.migration.set_state(DeviceState.PRE_COPY)
    while not stop.wait(0.05):
        offset = int(random.integers(half // chunk)) * chunk
        device.region_write(VFIO_PCI_BAR2_REGION_INDEX, offset, random.bytes(chunk))
        device.migration.read(chunk // 2)
    device.migration.set_state(DeviceState.RUNNING)


def be_a_victim(server: RunningServer) -> None:
    """Lose the client in PRE_COPY, get a damaged stream, send what was changed behind the server's back."""
    with server.connect() as device:
        device.migration.set_state(DeviceState.PRE_COPY)
        assert device.migration.read(PAGE)
    with server.connect() as device:
        device.migration.set_state(DeviceState.RESUMING)
        with pytest.raises(ClientCommandError):
            device.migration.write(b"\xff" * 64)
        device.reset()
    with server.connect() as device:
        write_pages(device, 100, 100, np.random.default_rng(3))
        device.migration.set_state(DeviceState.PRE_COPY)
        while device.migration.read(1 << 20):
            pass
        start = memory_address(server.process.pid, parse_size(MEMORY["victim"]))
        with open(f"/proc/{server.process.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(start + 50 * PAGE)
            memory.write(b"not tracked")
        device.migration.set_state(DeviceState.STOP_COPY)
        while device.migration.read(1 << 20):
            pass
        device.migration.set_state(DeviceState.STOP)
        assert server.audited()["save"]["status"] == "failed"
        device.migration.set_state(DeviceState.RUNNING)


def leave_after_the_last_byte(server: RunningServer) -> None:
    """Read everything, and go without a word about how it ended."""
    with server.connect() as device:
        device.migration.set_state(DeviceState.STOP_COPY)
        while device.migration.read(1 << 20):
            pass
    assert server.audited()["save"]["status"] == "sent"


def memory_address(pid: int, size_bytes: int) -> int:
    """Return where the server has its device's memory: a mapping of that size that no fork copies."""
    found = [
        int(start, 16)
        for start, end, flags in re.findall(
            r"^([0-9a-f]+)-([0-9a-f]+) .*\n(?:[A-Z].*\n)*?VmFlags:(.*)$",
            Path(f"/proc/{pid}/smaps").read_text(),
            re.MULTILINE,
        )
        if int(end, 16) - int(start, 16) == size_bytes and "dc" in flags.split()
    ]
    assert len(found) == 1, found
    return found[0]


def break_down(server: RunningServer, device: VfioUserDevice) -> None:
    """Begin a migration for which the host has no memory left: the server can only go to ERROR."""
    pid = server.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    status = Path(f"/proc/{pid}/status").read_text()
    size_kib = int(status.partition("VmSize:")[2].split()[0])
    resource.prlimit(pid, resource.RLIMIT_AS, (size_kib << 10, before[1]))
    with pytest.raises(ClientCommandError):
        device.migration.set_state(DeviceState.PRE_COPY)
    resource.prlimit(pid, resource.RLIMIT_AS, before)
    assert device.migration.get_state() is DeviceState.ERROR
    assert "MemoryError" in server.log()
    server.log_path.write_text("")  # the traceback in it is as it should be; any later one would not be


@contextmanager
def servers(library: Path, folder: Path, prometheus: Prometheus) -> Iterator[dict[str, RunningServer]]:
    """Yield running servers by name, all of them scraped."""
    ports = {name: free_port() for name in MEMORY}
    with server_farm(library, folder) as start:
        with ThreadPoolExecutor() as pool:
            started = pool.map(lambda name: start_one(start, name, ports[name]), MEMORY)
            running = dict(zip(MEMORY, started, strict=True))
        for name, port in ports.items():
            prometheus.add_target(name, port)
        up = f'count(count_over_time(up{{job="vfu-dev"}}[5s]) > 2 and up == 1) == {len(ports)}'
        wait_until(lambda: prometheus.query(up), "all servers are scraped")
        yield running


def start_one(start: ServerFactory, name: str, port: int) -> RunningServer:
    options = ["--metrics-port", str(port), "--fill", "0" if name == "broken" else "1"]
    if name == "source":  # a fault that nobody notices, for the panel that shows faults
        options += ["--fault", "op=region-read,delay=0.0001,rate=5%"]
    return start(*options, memory=MEMORY[name], name=name)


@pytest.fixture(scope="module")
def scenario(library: Path) -> Iterator[Scenario]:
    """Have it all happen, until everything that should fire does."""
    with short_folder() as folder:
        try:
            prometheus = Prometheus.start(folder, interval=INTERVAL, limits=NO_LIMITS, hold=HOLD)
        except BuildError as error:
            pytest.skip(str(error))
        try:
            with servers(library, folder, prometheus) as running:
                yield play(prometheus, running)
        finally:
            prometheus.stop()


def play(prometheus: Prometheus, running: dict[str, RunningServer]) -> Scenario:
    """Do what each device is there for, and wait for the alerts."""
    start = time.time()
    instances = {
        sample["metric"]["device"]: sample["metric"]["instance"]
        for sample in prometheus.query("vfu_client_connected")
    }
    expected = {
        ("VfuMigrationNotConverging", "churn"),
        ("VfuStuckInPreCopy", "churn"),
        ("VfuDowntimeAboveLimit", "destination"),
        ("VfuMigrationLost", "victim"),
        ("VfuMigrationUnconfirmed", "victim"),
        ("VfuStreamRefused", "victim"),
        ("VfuAuditFailed", "victim"),
        ("VfuDeviceError", "broken"),
    }
    stop = threading.Event()
    clients = {name: running[name].connect() for name in ("source", "destination", "churn", "broken")}
    with ExitStack() as stack:
        for client in clients.values():
            stack.enter_context(client)
        pool = stack.enter_context(ThreadPoolExecutor())
        stack.callback(stop.set)
        churning = pool.submit(churn, clients["churn"], stop)
        moving = pool.submit(migrate_there_and_back, prometheus, clients["source"], clients["destination"])
        be_a_victim(running["victim"])
        leave_after_the_last_byte(running["victim"])
        break_down(running["broken"], clients["broken"])
        moving.result()
        set_limits(prometheus)
        wait_until(
            lambda: churning.done() or expected <= prometheus.firing(),
            f"{sorted(expected)} fire",
        )
        running["victim"].kill()
        expected.add(("VfuServerGone", instances["victim"]))
        # All at once: one that a late scrape has ended meanwhile comes back.
        firing: set[tuple[str, str]] = wait_until(
            lambda: (found := prometheus.firing()) and (churning.done() or expected <= found) and found,
            "the killed server is missed, and the others fire still",
        )
        stop.set()
        churning.result()
    assert expected <= firing
    return Scenario(prometheus, start, time.time(), instances, firing)


def set_limits(prometheus: Prometheus) -> None:
    """Put the limit of downtimes between the two that there were, that of PRE_COPY below what `churn` has."""

    def last(device: str) -> float | None:
        found = prometheus.query(f'vfu_migration_last_downtime_seconds{{device="{device}"}}')
        return float(found[0]["value"][1]) if found else None

    short, long = (wait_until(lambda d=device: last(d), f"{device}'s downtime") for device in MOVED)
    assert short < long, "the second stood still for twice as long as the first, and its 32 MiB take 0.8 s"
    prometheus.set_limits({PRE_COPY_LIMIT: 1.0, DOWNTIME_LIMIT: short + (long - short) / 10})


@pytest.mark.parametrize("where", everything())
def test_every_expression_has_data(scenario: Scenario, where: str) -> None:
    """Each panel, rule and alert gives something for what happened; none of them is only well-formed."""
    series = scenario.prometheus.query_range(everything()[where], scenario.start, scenario.end)
    assert any(value != "NaN" for one in series for _, value in one["values"])


def test_nothing_else_fires(scenario: Scenario) -> None:
    """All alerts fire, each for the device that gives reason to, and none for a migration that went well."""
    assert {name for name, _ in scenario.firing} == set(alerts())
    assert len(scenario.firing) == len(alerts())
    ever = scenario.prometheus.query_range('ALERTS{device="source"}', scenario.start, scenario.end)
    assert ever == []


def test_alerts_say_which_device_and_how_much(scenario: Scenario) -> None:
    """No text of an alert has a hole where a label or value should be."""
    for alert in scenario.prometheus.api("alerts")["alerts"]:
        for text in alert["annotations"].values():
            assert "{{" not in text
            assert "<no value>" not in text
            assert "<error" not in text
        subject = alert["labels"].get("device", alert["labels"]["instance"])
        assert subject in alert["annotations"]["summary"]


def test_rules_evaluate_without_error(scenario: Scenario) -> None:
    for group in scenario.prometheus.api("rules")["groups"]:
        for rule in group["rules"]:
            assert (rule["name"], rule["health"], rule.get("lastError", "")) == (rule["name"], "ok", "")


def test_the_dashboard_tells_converging_from_not(scenario: Scenario) -> None:
    """The ratio that decides is above 1 for the migration that ended, and below for the one that did not."""
    expr = panels()["Convergence / {{device}}"]
    ratios: dict[str, list[float]] = {}
    for one in scenario.prometheus.query_range(expr, scenario.start, scenario.end):
        ratios.setdefault(one["metric"]["device"], []).extend(float(value) for _, value in one["values"])
    assert np.median(ratios["source"]) > 1
    assert np.median(ratios["churn"]) < 1


def test_the_dashboard_shows_what_devices_told(scenario: Scenario) -> None:
    """State changes, aborts by cause and downtime are those of the scenario."""
    changes = {
        (one["metric"]["from"], one["metric"]["to"])
        for one in scenario.prometheus.query_range(
            panels()["State changes / {{from}} to {{to}}"], scenario.start, scenario.end
        )
    }
    for change in (("RUNNING", "PRE_COPY"), ("PRE_COPY_P2P", "STOP_COPY"), ("PRE_COPY", "RUNNING")):
        assert change in changes
    (downtime,) = scenario.prometheus.query('vfu_migration_last_downtime_seconds{device="destination"}')
    assert float(downtime["value"][1]) > 0.3
