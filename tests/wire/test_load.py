"""`vfu-dev load` on real servers: inside the device, as its client, through a migration, and interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serverkit import (
    ANY_DOWNTIME,
    PATIENCE_SECONDS,
    VFU_DEV,
    RunningServer,
    ServerFactory,
    run_vfu_dev,
    server_farm,
    short_folder,
    wait_until,
)

from vfu_dev.client import ClientOptions, MigrationError, Migrator, VfioUserDevice
from vfu_dev.client.moving import keep_writing, migrate
from vfu_dev.client.stop import Stop
from vfu_dev.client.target import MemoryInfo
from vfu_dev.client.workload import ClientWorkload
from vfu_dev.device.reference.layout import REGISTERS
from vfu_dev.errors import ConfigError, VfuDevError
from vfu_dev.workload import ArrayWriter, Burst, Phase, Workload, writes_of

MIB = 1 << 20


def load(*arguments: object, status: int | None = None) -> dict[str, Any]:
    """Run `vfu-dev load` and return its JSON; its status is that of a load that was carried, or was not."""
    done = run_vfu_dev("load", "--json", "-", *arguments)
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (status_of(result) if status is None else status), done.stderr
    return result


def status_of(result: dict[str, Any]) -> int:
    """Return the exit status of a load that went well, whether or not the machine carried it."""
    return 0 if result["keeps_up"] else 3


def assert_exact(result: dict[str, Any], tolerance: float = 0.05) -> None:
    """What was due is what the rate says, and was made or counted as missed, whatever the machine does."""
    asked = result["asked_rate_bytes"] * result["seconds"]
    size = result["written_bytes"] / result["writes"]
    due = (result["writes"] + result["missed_writes"]) * size
    # A generator may be behind by a quarter of a second at the end.
    assert (
        asked * (1 - tolerance) - result["asked_rate_bytes"] * 0.25 <= due <= asked * (1 + tolerance) + size
    )
    if not result["missed_writes"]:
        assert result["keeps_up"]
        assert result["carried"] == 1.0


@pytest.mark.parametrize("access", ["trap", "mmap"])
def test_inside_the_device(serve: ServerFactory, access: str) -> None:
    """The rate is kept, the load is gone afterwards, and the device's memory was written."""
    server = serve("--access", access)
    arguments = ["--dirty-rate", "2000p", "--pattern", "sequential", "--duration", 0]
    command = [*VFU_DEV, "load", "--json", "-", "--control", server.control_path, *arguments]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True) as process:
        wait_until(lambda: server.status()["memories"][0]["written_bytes"] == MIB, "all of it is written")
        with server.control() as control:
            wait_until(lambda: control.command("load-status")["seconds"] > 1, "a second of it")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=PATIENCE_SECONDS)
    result = json.loads(out)
    assert process.returncode == status_of(result)
    assert result["place"] == "device"
    assert_exact(result)
    with server.control() as control:
        assert not control.command("load-status")["running"]
    assert server.status()["memories"][0]["written_bytes"] == MIB


@pytest.fixture(scope="module")
def lasting(library: Path) -> Iterator[dict[str, RunningServer]]:
    """Two servers by their access, for tests that need nothing new."""
    with short_folder() as folder, server_farm(library, folder) as start:
        yield {access: start("--access", access, "--fill", "5") for access in ("trap", "mmap")}


def watch_until(made: ClientWorkload, writes: int) -> None:
    """Wait until a load has made `writes` writes, with `keep_writing`, which is asked to stop then."""
    stop = Stop()
    keep_writing(
        made, PATIENCE_SECONDS, stop, lambda found: found.writes >= writes and stop.ask(signal.SIGINT)
    )
    assert stop.asked


@pytest.mark.parametrize(
    ("served", "access"), [("trap", "trap"), ("mmap", "trap"), ("mmap", "mmap"), ("mmap", "auto")]
)
@pytest.mark.parametrize("write_bytes", [8, 100, 4096, 65536])
def test_as_its_client(lasting: dict[str, RunningServer], served: str, access: str, write_bytes: int) -> None:
    """By message or mapped, in writes of any size: the memory holds what was written."""
    spec = Workload("hotset", rate_pages=800, write_bytes=write_bytes)
    with lasting[served].connect() as device:
        with ClientWorkload(device, spec, access=access, journal=True) as made:
            watch_until(made, 100)
        assert made.figures().writes >= 100
        assert made.mismatched_bytes() == 0
        held = device.region_read(2, 12345, 20)
        device.region_write(2, 12345, bytes(byte ^ 1 for byte in held))
        assert made.mismatched_bytes() == 20


def test_the_command_as_a_client(server: RunningServer) -> None:
    """The figures come as JSON, the check with them."""
    result = load("--socket", server.socket, "--dirty-rate", "500p", "--duration", 1, "--check")
    assert result["place"] == "client"
    assert result["mismatched_bytes"] == 0
    assert_exact(result)


def test_a_load_follows_its_device(serve: ServerFactory) -> None:
    """It is written before, during and after the move, and the destination holds all of it."""
    source, destination = serve("--fill", "5"), serve()
    arguments = ["--dirty-rate", "2000p", "--duration", 0, "--check", "--migrate-to", destination.socket]
    command = [*VFU_DEV, "load", "--json", "-", "--socket", source.socket, *arguments, "--migrate-after", 0.5]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True) as process:
        wait_until(lambda: destination.status()["counters"]["region_writes"] > 100, "it goes on there")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=PATIENCE_SECONDS)
    result = json.loads(out)
    assert process.returncode == status_of(result)
    assert result["migration"]["status"] == "completed"
    assert result["mismatched_bytes"] == 0
    assert result["quiet_seconds"] > 0
    assert_exact(result)
    counters = [server.status()["counters"]["region_writes"] for server in (source, destination)]
    assert all(counters)
    assert sum(counters) == result["writes"]
    # The pause is as long as the device stood still, and what was due meanwhile was not missed.
    assert result["migration"]["downtime_ms"] / 1000 <= result["quiet_seconds"] + 0.001


def test_a_migration_that_fails_leaves_the_load_at_the_source(serve: ServerFactory) -> None:
    """Status 1, the reason, and a load that went on where the device is."""
    source, destination = serve(), serve(memory="2M")
    arguments = ["--dirty-rate", "1000p", "--duration", 1.5, "--check", "--migrate-to", destination.socket]
    result = load("--socket", source.socket, *arguments, "--migrate-after", 0.3, status=1)
    assert result["migration"]["status"] == "failed"
    assert result["migration"]["error"]
    assert result["mismatched_bytes"] == 0
    assert_exact(result)


def test_a_load_under_which_nothing_converges(serve: ServerFactory) -> None:
    """Written faster than the link carries, the migration is given up with the load, and the numbers said."""
    source, destination = (serve("--access", "mmap", "--fill", "5", memory="16M") for _ in range(2))
    arguments = ["--dirty-rate", "20000p", "--duration", 3, "--check", "--migrate-to", destination.socket]
    arguments += ["--max-bandwidth", "4M", "--migrate-after", 0.2]
    result = load("--socket", source.socket, *arguments, status=1)
    assert "> threshold " in result["migration"]["error"]
    assert result["mismatched_bytes"] == 0
    assert source.status()["state"] == "RUNNING"


def test_interrupted_while_it_moves(serve: ServerFactory) -> None:
    """Asked to stop in PRE_COPY, the migration is cancelled and the source runs on with its load."""
    source, destination = serve("--fill", "5", memory="16M"), serve(memory="16M")
    stop = Stop()
    with source.connect() as one, destination.connect() as other:
        made = ClientWorkload(one, Workload("uniform", rate_pages=1000), journal=True)
        slow = ClientOptions(max_bandwidth=MIB)
        reports = iter(range(3))

        def report(_: object) -> None:
            if next(reports, None) is None:
                stop.ask(signal.SIGINT)

        with made, pytest.raises(MigrationError, match="interrupted"):
            migrate(made, one, other, slow, stop, report)
        assert made.mismatched_bytes() == 0
        assert source.status()["state"] == "RUNNING"
    with pytest.raises(KeyboardInterrupt):
        stop.ask(signal.SIGINT)


def test_what_the_machine_cannot_carry_is_said(server: RunningServer) -> None:
    """Status 3, a warning, `keeps_up` false, and the rate that was reached."""
    arguments = [*VFU_DEV, "load", "--socket", server.socket, "--dirty-rate", "100000000p", "--duration", "1"]
    done = subprocess.run(
        [str(one) for one in arguments], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 3
    assert "WARNING: the machine carried 0." in done.stdout
    result = load(
        "--control",
        server.control_path,
        "--write-rate",
        "100T",
        "--write-size",
        "1M",
        "--duration",
        1,
        status=3,
    )
    assert not result["keeps_up"]
    assert result["reached_rate_bytes"] < 0.95 * result["asked_rate_bytes"]
    assert result["missed_writes"] > 0


@pytest.mark.parametrize(
    ("place", "duration", "number", "status"),
    [
        ("control", "3600", signal.SIGINT, 130),
        ("control", "0", signal.SIGTERM, 0),
        ("socket", "3600", signal.SIGTERM, 143),
        ("socket", "0", signal.SIGINT, 0),
    ],
)
def test_signals_end_it_cleanly(
    server: RunningServer, place: str, duration: str, number: signal.Signals, status: int
) -> None:
    """The load ends, its figures are shown; the device runs on with nobody writing to it."""
    path = server.control_path if place == "control" else server.socket
    arguments = [*VFU_DEV, "load", f"--{place}", str(path), "--dirty-rate", "1000p", "--duration", duration]
    with subprocess.Popen(
        [*arguments, "--json", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:

        def writes() -> int:
            found = server.status()
            return int(found["load"].get("writes", 0)) + int(found["counters"]["region_writes"])

        wait_until(lambda: writes() > 10, "the load writes")
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    result = json.loads(out)
    assert process.returncode == (status or status_of(result)), err
    assert result["interrupted"]
    assert result["writes"] > 10
    assert "Traceback" not in err
    after = server.status()
    assert not after["load"]["running"]
    assert not after["connected"]


def test_bursts_and_phases_as_a_client(server: RunningServer) -> None:
    """Each phase writes what is its own, and the memory shows it."""
    busy = Workload("sequential", rate_pages=1000, burst=Burst(0.5, 0.05), seed=8)
    spec = Workload("phases", phases=(Phase(0.1, busy), Phase(0.05, Workload("idle")), Phase(0.1, busy)))
    with server.connect() as device, ClientWorkload(device, spec, journal=True) as made:
        watch_until(made, 300)  # more than two rounds
        made.close()
        assert made.mismatched_bytes() == 0


def test_a_server_that_goes_ends_the_load_in_words(serve: ServerFactory) -> None:
    """Whoever watches hears of it."""
    server = serve()
    with server.connect() as device, ClientWorkload(device, Workload("uniform", rate_pages=5000)) as made:
        server.kill()
        with pytest.raises(VfuDevError, match="closed the connection"):
            keep_writing(made, PATIENCE_SECONDS, Stop(), lambda _: None)


def test_the_reference_device_says_how_much_memory_it_has(serve: ServerFactory) -> None:
    """A BAR is a power of two, the memory need not be; nothing is written beyond it."""
    with serve("--page-size", "64K", memory="3M").connect() as device:
        memory = MemoryInfo(device)
        assert (memory.index, memory.size_bytes, memory.page_bytes) == (2, 3 * MIB, 65536)
        assert not memory.mappable
        with pytest.raises(ConfigError, match="region 5"):
            MemoryInfo(device, 5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--write-rate", "1M"], "expected one of --control"),
        (["--control", "a", "--socket", "b", "--write-rate", "1M"], "expected one of --control"),
        (["--control", "a"], "expected a load"),
        (["--control", "a", "--write-rate", "1M", "--check"], "with --socket only"),
        (["--preset", "never", "--write-rate", "1M"], "of its own"),
        (["--preset", "never", "--duration", "0"], "given up some time"),
        (["--preset", "never", "--preset-memory", "1M"], "cannot be kept from converging"),
        (["--preset", "never", "--max-bandwidth", "0"], "expected one above 0"),
    ],
)
def test_mistakes(arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    """One line, status 2."""
    assert said in _error_of(arguments, 2, capfd)


@pytest.mark.parametrize("place", ["--socket", "--control", "--guest"])
def test_a_place_where_nobody_is(place: str, capfd: pytest.CaptureFixture[str]) -> None:
    """One line, status 1."""
    assert "/nowhere" in _error_of([place, "/nowhere", "--write-rate", "1M"], 1, capfd)


def _error_of(arguments: list[str], status: int, capfd: pytest.CaptureFixture[str]) -> str:
    from vfu_dev.cli import main

    with pytest.raises(SystemExit) as left:
        main(["load", *arguments])
    assert left.value.code == status
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(("preset", "outcome"), [("never", "did not converge"), ("surely", "completed")])
def test_presets_end_as_they_say(preset: str, outcome: str, library: Path, tmp_path: Path) -> None:
    """The number that decides comes before the migration, measured ones during it; the outcome follows."""
    # A measurement comes each second, if anybody has a processor then: one in these seconds is enough.
    seconds = "6" if preset == "never" else "120"
    arguments = ["load", "--preset", preset, "--preset-memory", "16M", "--max-bandwidth", "8M"]
    arguments += ["--duration", seconds, "--json", str(tmp_path / "preset.json")]
    done = run_vfu_dev(*arguments)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "preset.json").read_text())
    assert told["series"]
    assert told["measured"] == told["series"][-1]
    assert [one["seconds"] for one in told["series"]] == sorted(one["seconds"] for one in told["series"])
    lines = done.stdout.splitlines()
    assert any(line.startswith("to watch: vfu-dev top ") for line in lines)
    verdict = "not converging" if preset == "never" else "converging"
    assert lines[0].startswith(f"expected: {verdict}: dirty rate ")
    assert lines[0].endswith("> threshold 2.4 MiB" if preset == "never" else "<= threshold 2.4 MiB")
    assert any(" s: dirty rate " in line for line in lines[1:-1])
    assert lines[-1].startswith(outcome)
    assert lines[-1].endswith("as expected")


def test_a_load_of_registers_goes_on_at_the_destination(serve: ServerFactory) -> None:
    """What the guest started at the source is one load with what the destination does, write for write."""
    source, destination = serve(), serve()
    registers = {"load_rate": 5000, "load_seed": 99, "load_pattern": 4, "load_write_bytes": 24}
    registers |= {"load_zipf_exponent": 1_100_000, "load_ctrl": 3}

    def write(device: VfioUserDevice, name: str, value: int) -> None:
        device.region_write(0, REGISTERS[name].offset, REGISTERS[name].encode(value))

    def count(device: VfioUserDevice) -> int:
        return int.from_bytes(device.region_read(0, REGISTERS["load_count"].offset, 8), "little")

    with source.connect() as one, destination.connect() as other:
        for name, value in registers.items():
            write(one, name, value)
        wait_until(lambda: count(one) > 500, "the source writes")
        Migrator(one, other, ANY_DOWNTIME).run()
        moved = count(one)  # the destination writes already
        assert 500 < moved <= count(other)
        wait_until(lambda: count(other) > moved + 500, "the destination goes on")
        write(other, "load_ctrl", 0)
        made, held = count(other), bytes(other.region_read(2, 0, MIB))
    spec = Workload("zipf", rate_pages=1, seed=99, write_bytes=24, zipf_exponent=1.1)
    writes = writes_of(spec, MIB)
    assert writes is not None
    expected = np.zeros(MIB, dtype=np.uint8)
    ArrayWriter(expected, 4096, writes).write(0, made)
    assert held == expected.tobytes()


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupted_preset_leaves_nothing_behind(late: bool, library: Path, short_tmp: Path) -> None:
    """While its servers start and while it migrates: the status of the signal, no process, no file."""
    arguments = [*VFU_DEV, "load", "--preset", "never", "--duration", "60"]
    environment = os.environ | {"TMPDIR": str(short_tmp)}
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for words in ["dirty rate", "to watch", "dirty rate"][: 3 if late else 1]:
            assert words in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, err
    assert err == ""
    assert "interrupted" in out or not late
    assert list(short_tmp.iterdir()) == []
    mine = str(short_tmp).encode()
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if mine in _content(path)]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # that process is gone
        return b""


def test_an_authors_device_has_the_engine_too(serve: ServerFactory) -> None:
    """Nobody wrote a line for it: its memory is written, and moves with what was written."""
    example = Path(__file__).parents[2] / "docs" / "examples" / "kvstore.py"
    source, destination = (serve("--device", f"{example}:KeyValueStore", memory=None) for _ in range(2))
    spec = Workload("uniform", rate_pages=300, write_bytes=32)
    with source.control() as control, source.connect() as one, destination.connect() as other:
        control.command("load", load=spec.to_dict())
        wait_until(lambda: control.command("load-status")["writes"] > 100, "the device writes")
        memory = control.status()["memories"][0]
        Migrator(one, other, ANY_DOWNTIME).run()
        made = control.command("load", load=None)["writes"]
        held = np.frombuffer(other.region_read(2, 0, memory["size_bytes"]), dtype=np.uint8)
        # The source has not written since it stopped: its load does not migrate.
        assert not destination.status()["load"]["running"]
    writes = writes_of(spec, memory["size_bytes"], memory["page_size_bytes"])
    assert writes is not None
    expected = np.zeros(memory["size_bytes"], dtype=np.uint8)
    ArrayWriter(expected, memory["page_size_bytes"], writes).write(0, made)
    assert held.tobytes() == expected.tobytes()
