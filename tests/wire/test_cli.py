"""`vfu-dev info` and `vfu-dev migrate` as a user runs them, and the migrator when something goes wrong."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from liarkit import all_lies, liar
from serverkit import (
    ANY_DOWNTIME_ARGUMENTS,
    PATIENCE_SECONDS,
    VFU_DEV,
    RunningServer,
    ServerFactory,
    run_vfu_dev,
    wait_until,
)

from vfu_dev.client import ClientOptions, ClientProgress, MigrationError, Migrator
from vfu_dev.uapi import DeviceState

BAR2 = 2
MIB = 1 << 20


def migrate(
    source: RunningServer, destination: RunningServer, *options: object
) -> tuple[int, dict[str, Any], str]:
    """Run `vfu-dev migrate`; return exit status, JSON and stderr."""
    out = source.socket.with_suffix(".json")
    done = run_vfu_dev("migrate", source.socket, destination.socket, "--json", out, *options)
    return done.returncode, json.loads(out.read_text()), done.stderr


def is_running(server: RunningServer) -> bool:
    with server.connect() as device:
        device.region_write(BAR2, 0, b"the source goes on")
        return device.migration.get_state() is DeviceState.RUNNING


# --- info ---------------------------------------------------------------------------------------------------


def test_info_shows_all_of_our_server(server: RunningServer) -> None:
    done = run_vfu_dev("info", server.socket, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["protocol_version"] == "0.0"
    assert found["device"] == {
        "vendor": "0x4656",
        "device": "0x4455",
        "class": "0x088000",
        "revision": "0x01",
    }
    assert {region["name"]: region["size_bytes"] for region in found["regions"]}["BAR2"] == MIB
    assert {irq["name"] for irq in found["irqs"]} >= {"MSI-X"}
    migration = found["migration"]
    assert migration["state"] == "RUNNING"
    assert {"STOP_COPY", "PRE_COPY"} <= set(migration["flags"])
    assert migration["data_size"]
    assert migration["precopy_info"]
    assert migration["dma_logging"]
    assert migration["stop_copy_length"] > MIB
    assert found["missing"] == []
    text = run_vfu_dev("info", server.socket)
    assert text.returncode == 0
    assert "0x4656:0x4455" in text.stdout
    assert "missing" not in text.stdout


def test_info_says_what_another_server_lacks(short_tmp: Path) -> None:
    """Against `vfu-dev hostile`, honest but without GET_PRECOPY_INFO: the gap and what follows from it."""
    with liar(short_tmp, "version-precopy-false") as other:
        done = run_vfu_dev("info", other.socket)
    assert done.returncode == 0, done.stderr
    assert "P2P: QEMU migrates it only as the VM's single VFIO device" in done.stdout
    assert "MIG_GET_PRECOPY_INFO" in done.stdout


def test_info_of_a_busy_server_gives_up_in_words(server: RunningServer) -> None:
    with server.connect():
        done = run_vfu_dev("info", server.socket, "--timeout", "0.5")
    assert done.returncode == 1
    assert "busy with another client" in done.stderr
    assert str(server.socket) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_info_without_a_server_is_one_line(short_tmp: Path) -> None:
    done = run_vfu_dev("info", short_tmp / "nobody")
    assert done.returncode == 1
    assert "cannot connect" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- migrate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "method"), [((), "control"), (("--verify", "memory"), "memory")])
def test_migrate_moves_the_device_and_says_so(
    serve: ServerFactory, options: tuple[str, ...], method: str
) -> None:
    """The JSON has what that of `lab migrate` has; both ways to compare agree that the state is the same."""
    source, destination = serve("--fill", "21", memory="4M", name="left"), serve(memory="4M", name="right")
    status, result, stderr = migrate(source, destination, *options)
    assert status == 0, stderr
    assert result["status"] == "completed"
    assert result["error"] is None
    (device,) = result["devices"]
    assert device["name"] == "left"
    assert device["digest_match"] is True
    assert device["digest_source"] == device["digest_destination"]
    assert device["digest_method"] == method
    assert device["initial_bytes"] >= 4 * MIB
    assert device["precopy_bytes"] >= 4 * MIB
    assert 0 < device["stop_copy_bytes"] < 65536
    assert device["passes"] == 1  # nobody writes to it
    assert 0 < result["downtime_ms"] < result["total_ms"]
    saved = source.status()["save"]
    assert (saved["precopy_bytes"], saved["stop_copy_bytes"]) == (
        device["precopy_bytes"],
        device["stop_copy_bytes"],
    )
    with source.connect() as one, destination.connect() as other:
        assert one.region_read(BAR2, 0, 4 * MIB) == other.region_read(BAR2, 0, 4 * MIB)


def test_migrate_without_pre_copy(serve: ServerFactory) -> None:
    source, destination = serve("--fill", "21"), serve()
    status, result, _ = migrate(source, destination, "--pre-copy", "off")
    (device,) = result["devices"]
    assert status == 0
    assert device["digest_match"] is True
    assert (device["initial_bytes"], device["precopy_bytes"], device["passes"]) == (0, 0, 0)
    assert device["stop_copy_bytes"] > MIB


def test_migrate_there_and_back(serve: ServerFactory) -> None:
    """Sources are left as good sources; the second move carries what happened in between."""
    left, right = serve("--fill", "2"), serve()
    assert migrate(left, right)[0] == 0
    with right.connect() as device:
        device.region_write(BAR2, 4096, b"on the right")
    assert migrate(right, left)[0] == 0
    with left.connect() as device:
        assert device.region_read(BAR2, 4096, 12) == b"on the right"


def test_migrate_to_another_size_fails_while_the_source_runs(serve: ServerFactory) -> None:
    source, destination = serve("--fill", "2"), serve(memory="2M")
    status, result, stderr = migrate(source, destination)
    assert status == 1
    assert result["status"] == "failed"
    assert result["phase"] == "pre-copy"
    assert result["devices"][0]["digest_match"] is None
    assert "MIG_DATA_WRITE" in result["error"]
    assert "migration failed in pre-copy" in stderr
    assert is_running(source)


def test_migrate_to_nobody_fails(server: RunningServer, short_tmp: Path) -> None:
    out = short_tmp / "out.json"
    done = run_vfu_dev("migrate", server.socket, short_tmp / "nobody", "--json", out)
    assert done.returncode == 1
    assert json.loads(out.read_text())["status"] == "failed"
    assert "destination" in done.stderr
    assert is_running(server)


def test_migrate_to_itself_fails(server: RunningServer) -> None:
    """The source is then the client that keeps the destination busy."""
    done = run_vfu_dev("migrate", server.socket, server.socket, "--quiet")
    assert done.returncode == 1
    assert "busy with another client" in done.stderr
    assert is_running(server)


def at_most(result: dict[str, Any], bytes_a_second: int) -> bool:
    """Whether a migration kept to its limit; the last window, of 0.1 s, is not slept out."""
    (device,) = result["devices"]
    sent = device["precopy_bytes"] + device["stop_copy_bytes"]
    return bool(sent / bytes_a_second <= result["total_ms"] / 1000 + 0.1)


def test_migrate_keeps_to_its_bandwidth(serve: ServerFactory) -> None:
    source, destination = serve("--fill", "2", memory="4M"), serve(memory="4M")
    status, result, _ = migrate(source, destination, "--max-bandwidth", "8M")
    assert status == 0
    assert at_most(result, 8 * MIB)


def test_migrate_keeps_to_little_bandwidth(serve: ServerFactory) -> None:
    """A limit that is far below one transfer of the protocol's size a window is kept as well."""
    source, destination = serve("--fill", "2", memory="1M"), serve(memory="1M")
    status, result, _ = migrate(source, destination, "--max-bandwidth", "512K", "--downtime-limit", "100")
    assert status == 0
    assert at_most(result, 512 << 10)


@pytest.mark.parametrize("path", ["/proc/nowhere/out.json", "/dev/full"])
def test_figures_that_cannot_be_written_are_one_line(serve: ServerFactory, path: str) -> None:
    """A file that cannot be made, and a disk that is full: the reason, not a traceback."""
    source, destination = serve(), serve()
    options = ("--quiet", *ANY_DOWNTIME_ARGUMENTS, "--json", path)
    done = run_vfu_dev("migrate", source.socket, destination.socket, *options)
    # A place that cannot be is a mistake on the command line; a disk is full when the work is done.
    status = 2 if path.startswith("/proc") else 1
    assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
    assert done.stderr.startswith(f"vfu-dev: --json {path}: ")


def test_a_place_for_figures_that_cannot_be_is_refused_before_the_work() -> None:
    """Not after an hour of it: these sockets are not there, and nobody has looked yet."""
    done = run_vfu_dev("migrate", "/nowhere/a.sock", "/nowhere/b.sock", "--json", "/proc/nowhere/out.json")
    assert done.returncode == 2
    assert done.stderr == "vfu-dev: --json /proc/nowhere/out.json: No such file or directory\n"


def test_a_page_that_cannot_be_written_is_one_line() -> None:
    """What no command looks at by itself is told by all of them in the same way."""
    figures = Path(__file__).parents[1] / "unit/data/lab-not-converging.json"
    done = run_vfu_dev("report", figures, "--out", "/proc/nowhere/page.html")
    *work, error = done.stderr.splitlines()
    assert (done.returncode, len(work)) == (1, 1), done.stderr
    assert error.startswith("vfu-dev: /proc/nowhere")


def test_a_package_that_is_missing_is_named(short_tmp: Path) -> None:
    """Without the lab's packages its commands say what to install."""
    (short_tmp / "matplotlib").mkdir()
    (short_tmp / "matplotlib/__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'matplotlib'\", name='matplotlib')"
    )
    done = subprocess.run(
        [*map(str, VFU_DEV), "report", str(Path(__file__).parents[1] / "unit/data/lab-not-converging.json")],
        env={**os.environ, "PYTHONPATH": str(short_tmp)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 1
    assert "vfu-dev: the Python package matplotlib is missing; run: pip install " in done.stderr
    for package in ("matplotlib", "jinja2", "scipy"):
        assert re.search(rf"'{package}[^']*'", done.stderr), (
            "never under our own name, which an index may have"
        )
    assert "Traceback" not in done.stderr


# --- the migrator when things go wrong ----------------------------------------------------------------------


def test_a_device_dirtied_faster_than_the_link_does_not_converge(serve: ServerFactory) -> None:
    """It ends after the passes it was given, says by how much it missed, and the source runs on."""
    source, destination = serve("--fill", "4"), serve()
    with source.connect() as device, destination.connect() as other:
        turns = itertools.count(1)

        def rewrite(state: ClientProgress) -> None:
            if state.phase == "pre-copy":  # other bytes every time: what is equal need not be sent again
                device.region_write(BAR2, 0, bytes([next(turns) % 256]) * MIB)

        # All of it is rewritten after each read: of 400 KiB, because the link carries no more in a window.
        options = ClientOptions(downtime_limit_seconds=0.001, max_bandwidth=4 * MIB, max_passes=3)
        said = r"did not converge in 3 passes: remaining [0-9.]+ [KM]iB > threshold "
        with pytest.raises(MigrationError, match=said):
            Migrator(device, other, options, reporter=rewrite).run()
        assert device.migration.get_state() is DeviceState.RUNNING
        assert source.status()["save"]["status"] == "aborted"


def test_a_time_limit_ends_it(serve: ServerFactory) -> None:
    source, destination = serve("--fill", "4", memory="8M"), serve(memory="8M")
    with source.connect() as device, destination.connect() as other:
        options = ClientOptions(max_bandwidth=4 * MIB, timeout_seconds=0.5)
        with pytest.raises(MigrationError, match="not completed after"):
            Migrator(device, other, options).run()
        assert device.migration.get_state() is DeviceState.RUNNING


def test_a_destination_that_dies_leaves_the_source_running(serve: ServerFactory) -> None:
    source, destination = serve("--fill", "4", memory="8M"), serve(memory="8M")
    with source.connect() as device, destination.connect() as other:

        def kill(state: ClientProgress) -> None:
            if state.precopy_bytes and destination.process.poll() is None:
                destination.kill()

        with pytest.raises(MigrationError, match="the server closed the connection"):
            Migrator(device, other, ClientOptions(max_bandwidth=16 * MIB), reporter=kill).run()
        assert device.migration.get_state() is DeviceState.RUNNING
    assert is_running(source)


def test_a_source_that_dies_is_told_so(serve: ServerFactory) -> None:
    source, destination = serve("--fill", "4", memory="8M"), serve(memory="8M")
    with source.connect() as device, destination.connect() as other:

        def kill(state: ClientProgress) -> None:
            if state.precopy_bytes and source.process.poll() is None:
                source.kill()

        with pytest.raises(MigrationError, match="the source could not be taken back to RUNNING"):
            Migrator(device, other, ClientOptions(max_bandwidth=16 * MIB), reporter=kill).run()
    wait_until(lambda: destination.status()["state"] == "RUNNING", "the destination lets go of half a state")
    assert destination.status()["resume"]["status"] in ("aborted", "failed")


def test_a_verification_that_fails_keeps_the_destination_from_running(serve: ServerFactory) -> None:
    source, destination = serve("--fill", "4"), serve()
    with source.connect() as device, destination.connect() as other:

        def refuse() -> None:
            raise MigrationError("verify", "not equal")

        with pytest.raises(MigrationError, match="migration failed in verify"):
            Migrator(device, other, verify=refuse).run()
        assert device.migration.get_state() is DeviceState.RUNNING
        assert other.migration.get_state() is DeviceState.STOP


def test_the_hostile_server_lists_its_lies() -> None:
    """What tests/lab relies on: unique names, one a line, each in one phase."""
    names = all_lies()
    assert len(names) == len(set(names)) > 600
    by_phase = [name for phase in ("attach", "run", "save", "resume") for name in all_lies(phase)]
    assert sorted(by_phase) == sorted(names)


def test_migrate_says_which_server_refused(serve: ServerFactory) -> None:
    """The destination does not take the state, and the source does not count that as completed."""
    source = serve("--fill", "1")
    destination = serve("--fault", "op=transition,error=EIO,arc=RESUMING->STOP")
    done = run_vfu_dev("migrate", source.socket, destination.socket)
    assert done.returncode == 1
    assert "destination: the server refused DEVICE_FEATURE: Input/output error" in done.stderr
    status = source.status()
    assert status["save"]["status"] == "aborted"
    with source.control() as control:
        totals = control.command("figures")["snapshot"]["totals"]
    assert {name: count for name, count in totals["saves"].items() if count} == {"cancelled": 1}
    other = serve("--fault", "op=mig-read,error=EIO")
    done = run_vfu_dev("migrate", other.socket, source.socket)
    assert done.returncode == 1
    assert "source: the server refused MIG_DATA_READ: Input/output error" in done.stderr


def test_a_long_tmpdir_is_named(tmp_path: Path) -> None:
    """Sockets lie below it, and their names end at 107 bytes."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    done = run_vfu_dev("load", "--preset", "surely", "--memory", "16M", TMPDIR=str(folder))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"vfu-dev: TMPDIR={folder}: too long for UNIX sockets")
    assert not any(folder.iterdir())


def test_a_hangup_is_left_by_the_same_way_as_an_interrupt() -> None:
    """A terminal that is closed sends SIGHUP; what a command made is cleared away all the same."""
    script = (
        "import os, signal\n"
        "from vfu_dev.cli.signals import end_on_sigterm, interrupted_status\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may be under nohup\n"
        "end_on_sigterm()\n"
        "try:\n    os.kill(os.getpid(), signal.SIGHUP)\n    signal.pause()\n"
        "except KeyboardInterrupt:\n    print('cleared', interrupted_status())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS
    )
    assert done.stdout == "cleared 129\n"
