"""Moves between two network namespaces: a shaped link, multifd, TLS, and links that break."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from labkit import KIB, MIB, PRELOAD_PATIENT, begin_and_stay, dirtying, wait_back_at_source
from serverkit import PATIENCE_SECONDS, VFU_DEV

from vfu_dev.builds.qemu_binary import QemuBinary
from vfu_dev.lab.judge import judge
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.migrate import run
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.lab.pausing import CAPABILITY, PAUSED
from vfu_dev.lab.result import MigrationResult
from vfu_dev.lab.route import LinkRoute
from vfu_dev.vm.namespaces import INTERFACE
from vfu_dev.vm.network import BURST_SECONDS, MIN_BURST_BYTES, LinkedHosts, LinkSpec
from vfu_dev.vm.own_device import package_environment

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

Options = Callable[..., MigrateOptions]
InLab = Callable[[MigrateOptions, Callable[[Lab], Coroutine[Any, Any, Any]]], Any]

# 51 KiB: less than the device, so that something goes in PRE_COPY however slow the machine is.
FITS_NOT = ["--avail-switchover-bandwidth", "512K", "--downtime-limit", "100"]
FAST = LinkSpec.parse("1Gbit")


def cut(hosts: LinkedHosts) -> None:
    """Break the link, as a pulled cable does: neither end gets an event."""
    hosts.run(1, "ip", "link", "set", INTERFACE, "down")


def linked(lab: Lab) -> LinkedHosts:
    assert isinstance(lab.route, LinkRoute)
    return lab.route.linked


def test_multifd_over_a_shaped_link(options: Options, tmp_path: Path) -> None:
    """The link carries all of it, no faster than asked; the report says who shapes and what was measured."""
    spec = LinkSpec.parse("100Mbit,delay=2ms")
    chosen = options(
        link=spec,
        memory_bytes=4 * MIB,
        max_bandwidth=0,
        capabilities=(("multifd", True),),
        parameters=(("multifd-channels", 3),),
    )
    result = asyncio.run(run(chosen, tmp_path / "logs", []))
    assert result.problems == []
    assert "multifd" in result.qemu.capabilities
    (device,) = result.devices
    assert device.digest_match
    link = result.link
    assert link is not None
    assert link["asked"] == "100Mbit,delay=2ms"
    assert link["rate_bytes_per_second"] == 12_500_000
    assert (link["rate_by"], link["delay_by"]) in (("tbf", "netem"), ("tbf", "relay"))
    assert link["carried_bytes"] > device.precopy_bytes + device.stop_copy_bytes
    # Within a stretch of half a second, a full bucket comes on top.
    most = spec.rate_bytes + 2 * max(MIN_BURST_BYTES, spec.rate_bytes * BURST_SECONDS)
    assert 0 < link["measured_bytes_per_second"] < most
    for command in (result.qemu.command_line_source, result.qemu.command_line_destination):
        assert command[0] == "nsenter"


def test_the_command_reports_its_link(qemu: Path, library: Path, tmp_path: Path) -> None:
    """`lab migrate --link`: JSON, summary and page have it."""
    command = [*VFU_DEV, "lab", "migrate", "--guest", "none", "--memory", "256K", "--dirty-rate", "16p"]
    command += FITS_NOT
    command += ["--link", "200Mbit", "--quiet", "--out", str(tmp_path), "--json", "-"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode in (0, 3), said.stderr
    report = json.loads(said.stdout)
    assert report["link"]["rate_bytes_per_second"] == 25_000_000
    assert report["link"]["delay_by"] is None
    assert "link 200Mbit (rate by tbf): carried " in said.stderr
    assert "Link 200Mbit (rate by tbf): carried " in (tmp_path / "report.html").read_text()


def test_loss_is_the_kernels_or_refused(qemu: Path, library: Path, tmp_path: Path, short_tmp: Path) -> None:
    """Where there is no netem nobody loses packets: status 2, with the reason, and nothing is left behind."""
    with LinkedHosts(FAST) as hosts:
        netem = hosts.netem
    command = [*VFU_DEV, "lab", "migrate", "--guest", "none", "--memory", "256K", "--dirty-rate", "16p"]
    command += FITS_NOT
    command += ["--link", "1Gbit,loss=0.1%", "--quiet", "--out", str(tmp_path), "--json", "-"]
    environment = os.environ | {"TMPDIR": str(short_tmp)}
    said = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if netem:
        assert json.loads(said.stdout)["link"]["loss_by"] == "netem"
    else:
        assert said.returncode == 2
        assert "--link 1Gbit,loss=0.1%: loss needs the kernel's netem" in said.stderr
    assert "Traceback" not in said.stderr
    assert list(short_tmp.iterdir()) == []


def test_there_is_no_way_back_over_a_link(options: Options, in_lab: InLab) -> None:
    """After a turn-around the next move is refused in words, and the VM runs on."""

    async def scenario(lab: Lab) -> str:
        await lab.move()
        await lab.turn_around()
        with pytest.raises(Exception, match="one way") as refused:
            await lab.migrate()
        assert await lab.source.qemu.run_state() == "running"
        return str(refused.value)

    in_lab(options(link=FAST, load=dirtying(0), settle_seconds=0.0), scenario)


def give_up_soon(lab: Lab) -> None:
    """Have TCP take a peer that does not answer for gone within seconds: by default that takes 15 minutes."""
    for host in (0, 1):
        linked(lab).run(host, "sh", "-c", "echo 3 >/proc/sys/net/ipv4/tcp_retries2")


async def judge_source(lab: Lab) -> None:
    """Assert that the VM goes on at the source as if nothing had been: it writes, and finds all of it."""
    await wait_back_at_source(lab)
    result = MigrationResult()
    await lab.collect(result)
    judge(result, True)
    assert any(text.startswith("QEMU says 'failed'") for text in result.problems), result.problems
    assert not any("digests" in text for text in result.problems)
    await lab.guest.stop()
    assert (await lab.guest.verify()).verified


def test_a_link_that_breaks_in_pre_copy(options: Options, in_lab: InLab) -> None:
    """QEMU says that the migration failed, the device goes back to RUNNING, and the guest lost nothing."""

    async def scenario(lab: Lab) -> None:
        give_up_soon(lab)
        await begin_and_stay(lab)
        cut(linked(lab))
        row = await lab.wait_for(lambda row: row["status"] == "failed", "the end", PATIENCE_SECONDS)
        assert row["qemu"]["error-desc"]
        await judge_source(lab)

    in_lab(options(link=FAST, load=dirtying(256 * KIB)), scenario)


def test_a_link_that_breaks_in_stop_copy(options: Options, in_lab: InLab) -> None:
    """The VM stands still when it breaks; it runs again at the source, with its device."""

    async def scenario(lab: Lab) -> None:
        give_up_soon(lab)
        await lab.configure()
        await lab.begin(await lab.listen())
        row = await lab.wait_for(lambda row: row["status"] == PAUSED, "the pause")
        assert row["source"][0]["state"] == "STOP_COPY"
        cut(linked(lab))
        await lab.source.qemu.execute("migrate-continue", state=PAUSED)
        await lab.wait_for(lambda row: row["status"] == "failed", "the end", PATIENCE_SECONDS)
        await judge_source(lab)

    in_lab(options(link=FAST, load=dirtying(256 * KIB), capabilities=((CAPABILITY, True),)), scenario)


def make_certificates(folder: Path) -> None:
    """Make a CA, and a certificate for each end that it signed, as QEMU's tls-creds-x509 wants them."""
    folder.mkdir()

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    key = ["-newkey", "rsa:2048", "-nodes", "-days", "2"]
    openssl("req", "-x509", *key, "-subj", "/CN=CA", "-keyout", "ca-key.pem", "-out", "ca-cert.pem")
    for end, usage in (("server", "serverAuth"), ("client", "clientAuth")):
        extensions = ["-addext", "subjectAltName=IP:192.0.2.2", "-addext", f"extendedKeyUsage={usage}"]
        signed = ["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-addext", "basicConstraints=CA:false"]
        files = ["-keyout", f"{end}-key.pem", "-out", f"{end}-cert.pem"]
        openssl("req", "-x509", *key, "-subj", f"/CN={end}", *signed, *extensions, *files)


async def with_tls(lab: Lab, source: Path, destination: Path) -> None:
    """Give both QEMUs credentials."""
    for host, folder, end in ((lab.source, source, "client"), (lab.destination, destination, "server")):
        credentials = {"qom_type": "tls-creds-x509", "id": "tls0", "dir": str(folder), "endpoint": end}
        await host.qemu.execute("object-add", **credentials, verify_peer=True)


def test_tls_with_multifd(
    options: Options, in_lab: InLab, stock_qemu: Callable[[str], QemuBinary], preload: Path, tmp_path: Path
) -> None:
    """Certificates made on the spot: a peer that another authority signed is refused, ours moves the VM."""
    make_certificates(ours := tmp_path / "ours")
    make_certificates(theirs := tmp_path / "theirs")
    chosen = options(
        qemu=stock_qemu("trixie-backports").path,
        link=FAST,
        capabilities=(("multifd", True),),
        parameters=(("tls-creds", "tls0"), ("multifd-channels", 2)),
        qemu_environment=PRELOAD_PATIENT,
        qemu_extra=(),
        load=dirtying(0),
    )

    async def scenario(lab: Lab) -> MigrationResult:
        await with_tls(lab, ours, theirs)
        assert (await lab.migrate())["status"] == "failed"
        await lab.wait_running(lab.source.qemu)
        await lab.replace_destination()
        folder = {"qom_type": "tls-creds-x509", "id": "tls0", "dir": str(ours), "endpoint": "server"}
        await lab.destination.qemu.execute("object-add", **folder, verify_peer=True)
        return await lab.move()

    result = in_lab(chosen, scenario)
    judge(result, True, verified=False)
    assert result.problems == []
    assert result.devices[0].digest_match
    assert result.link["carried_bytes"] > result.devices[0].precopy_bytes


@pytest.fixture
def relay() -> Iterator[tuple[int, socket.socket]]:
    """A relay with 0.1 s each way and room for 64 KiB: its port, and where it goes on to."""
    with socket.create_server(("127.0.0.1", 0)) as target, socket.socket() as probe:
        # It keeps the port for the relay, which may listen beside a socket that does not listen.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        words = ["127.0.0.1", str(port), "127.0.0.1", str(target.getsockname()[1]), "0.1", str(64 * KIB)]
        with subprocess.Popen(
            [sys.executable, "-m", "vfu_dev.vm.relay", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=package_environment(),
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n"
            yield port, target
            process.stdin.close()
            assert process.wait(PATIENCE_SECONDS) == 0


def test_a_relay_delays_and_changes_nothing(relay: tuple[int, socket.socket]) -> None:
    """Both ways, whole and in order, none earlier than its delay; an end arrives as one."""
    port, target = relay
    data = os.urandom(3 * MIB)
    with socket.create_connection(("127.0.0.1", port)) as near:
        far, _ = target.accept()
        with far:
            began = time.monotonic()
            near.sendall(b"x")
            assert far.recv(1) == b"x"
            assert time.monotonic() - began >= 0.1
            far.sendall(b"y")
            assert near.recv(1) == b"y"
            assert time.monotonic() - began >= 0.2
            with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=near.fileno()) as sender:
                assert sender.stdin is not None
                received = bytearray()
                sender_stdin = sender.stdin

                async def both() -> None:
                    def send() -> None:
                        sender_stdin.write(data)
                        sender_stdin.close()

                    def receive() -> None:
                        while len(received) < len(data):
                            received.extend(far.recv(1 << 16))

                    await asyncio.gather(asyncio.to_thread(send), asyncio.to_thread(receive))

                asyncio.run(both())
            assert bytes(received) == data
            near.shutdown(socket.SHUT_WR)
            assert far.recv(1) == b""
