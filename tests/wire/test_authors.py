"""An author's device, served from its file: driven over the socket, migrated, refused what it lacks."""

from __future__ import annotations

import errno
import struct
import subprocess
from pathlib import Path

import pytest
from serverkit import ANY_DOWNTIME, RunningServer, ServerFactory, readable
from test_serve import run

from vfu_dev.client import ClientCommandError, MigrationError, Migrator, VfioUserDevice
from vfu_dev.client.digest import resumed_digest, saved_digest
from vfu_dev.uapi import (
    VFIO_PCI_BAR0_REGION_INDEX,
    VFIO_PCI_BAR2_REGION_INDEX,
    VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX,
)

KVSTORE = Path(__file__).parents[2] / "docs" / "examples" / "kvstore.py"
KEY, VALUE, COMMAND, STATUS, COUNT = 0x00, 0x08, 0x10, 0x14, 0x18
PUT, GET, DELETE = 1, 2, 3


class Store:
    """The key-value store as its driver sees it."""

    def __init__(self, device: VfioUserDevice) -> None:
        self.device = device

    def _read(self, offset: int, form: str) -> int:
        data = self.device.region_read(VFIO_PCI_BAR0_REGION_INDEX, offset, struct.calcsize(form))
        return int(struct.unpack(form, data)[0])

    def do(self, command: int, key: int, value: int = 0) -> int:
        """Carry out a command and return its status."""
        for offset, content in ((KEY, key), (VALUE, value)):
            self.device.region_write(VFIO_PCI_BAR0_REGION_INDEX, offset, struct.pack("<Q", content))
        self.device.region_write(VFIO_PCI_BAR0_REGION_INDEX, COMMAND, struct.pack("<I", command))
        return self._read(STATUS, "<I")

    def get(self, key: int) -> int | None:
        """Return the value of `key`, None if it is not there."""
        return self._read(VALUE, "<Q") if self.do(GET, key) == 0 else None

    @property
    def count(self) -> int:
        """Keys stored."""
        return self._read(COUNT, "<Q")


@pytest.fixture
def kvstore(serve: ServerFactory) -> RunningServer:
    return serve("--device", f"{KVSTORE}:KeyValueStore", memory=None)


def test_the_example_stores_finds_and_forgets(kvstore: RunningServer) -> None:
    with kvstore.connect() as device:
        store = Store(device)
        slots = device.region_info(VFIO_PCI_BAR2_REGION_INDEX).size_bytes // 32
        near = [5, 5 + slots, 5 + 2 * slots]  # all three want the same slot
        for key in near:
            assert store.do(PUT, key, key * 10) == 0
        assert store.do(PUT, 5, 51) == 0
        assert store.count == 3
        assert store.do(DELETE, near[1]) == 0
        assert [store.get(key) for key in near] == [51, None, near[2] * 10]
        assert (store.do(DELETE, near[1]), store.do(9, 0), store.count) == (1, 3, 2)
        assert store.do(PUT, near[1], 7) == 0
        assert (store.get(near[1]), store.count) == (7, 3)


def test_the_guest_reads_the_table_and_cannot_write_it(kvstore: RunningServer) -> None:
    with kvstore.connect() as device:
        Store(device).do(PUT, 3, 0xABCD)
        slot = device.region_read(VFIO_PCI_BAR2_REGION_INDEX, 3 * 32, 32)
        assert struct.unpack("<4Q", slot) == (1, 3, 0xABCD, 0)
        device.region_write(VFIO_PCI_BAR2_REGION_INDEX, 3 * 32, bytes(32))
        assert device.region_read(VFIO_PCI_BAR2_REGION_INDEX, 3 * 32, 32) == slot


def test_each_command_raises_the_interrupt(kvstore: RunningServer) -> None:
    with kvstore.connect() as device:
        (eventfd,) = device.enable_irqs(VFIO_PCI_MSIX_IRQ_INDEX, 1)
        Store(device).do(PUT, 1, 1)
        assert readable([eventfd])


def test_the_example_migrates_between_two_servers_while_it_is_used(
    serve: ServerFactory, kvstore: RunningServer
) -> None:
    target = serve("--device", f"{KVSTORE}:KeyValueStore", memory=None)
    with kvstore.connect() as source, target.connect() as destination:
        store, moved = Store(source), Store(destination)
        for key in range(200):
            store.do(PUT, key << 7 | 1, key)
        puts = iter(range(200, 210))

        def use(_: object) -> None:
            """Go on storing as long as the source runs, which is what makes pages dirty again."""
            if migrator.progress.phase == "pre-copy" and (key := next(puts, None)) is not None:
                store.do(PUT, key << 7 | 1, key)

        migrator = Migrator(source, destination, reporter=use)
        progress = migrator.run()
        stored = store.count
        assert stored > 200
        assert progress.precopy_bytes > 0
        assert moved.count == stored
        assert [moved.get(key << 7 | 1) for key in range(stored)] == list(range(stored))
    digest = saved_digest(kvstore.status())
    assert digest is not None
    assert digest == resumed_digest(target.status())


def test_the_reference_device_refuses_the_examples_stream(
    serve: ServerFactory, kvstore: RunningServer
) -> None:
    other = serve()
    refused = pytest.raises(MigrationError, match="refused MIG_DATA_WRITE")
    with kvstore.connect() as source, other.connect() as destination, refused:
        Migrator(source, destination).run()
    assert "another shape" in other.log()
    assert "KeyValueStore" in other.log()


def test_what_the_pci_bus_is_told_can_be_configured(serve: ServerFactory, short_tmp: Path) -> None:
    config = short_tmp / "dev.toml"
    config.write_text(
        "vendor-id = 0x1234\ndevice-id = 0x5678\nsubsystem-vendor-id = 0x9abc\nsubsystem-id = 0xdef0\n"
        'class-code = 0x020001\nrevision = 0x42\nmsix-vectors = 200\nbar0-size = "64K"\nmemory = "2M"\n'
    )
    server = serve("--config", str(config), memory=None)
    with server.connect() as device:
        space = bytes(device.region_read(VFIO_PCI_CONFIG_REGION_INDEX, 0, 256))
        assert struct.unpack_from("<HH", space, 0x00) == (0x1234, 0x5678)
        assert struct.unpack_from("<HH", space, 0x2C) == (0x9ABC, 0xDEF0)
        assert space[0x08:0x0C] == bytes([0x42, 0x01, 0x00, 0x02])
        sizes = [device.region_info(index).size_bytes for index in (0, 2, 4)]
        assert sizes == [64 << 10, 2 << 20, 8 << 10]
        assert device.irq_info(VFIO_PCI_MSIX_IRQ_INDEX).count == 200
        at = space[0x34]
        while space[at] != 0x11:  # PCI_CAP_ID_MSIX
            at = space[at + 1]
        control, table, pba = struct.unpack_from("<HII", space, at + 2)
        assert (control & 0x7FF, table, pba) == (199, 4, 0x1000 | 4)
        assert device.region_read(0, 0xF000, 4) == bytes(4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--memory", "1M"], "--memory: KeyValueStore decides this itself"),
        (["--fill", "1", "--page-size", "8K"], "--fill, --page-size: KeyValueStore decides"),
        (["--bar0-size", "1K"], "a power of two of at least 4096"),
        (["--bar5-size", "4K"], "this device has no BAR5, but BAR0, BAR2, BAR4"),
        (["--device", "no.such:Class"], "there is no module no, neither in"),
    ],
)
def test_what_the_example_does_not_have_is_one_line(
    library: Path, short_tmp: Path, options: list[str], text: str
) -> None:
    arguments = ["--socket", str(short_tmp / "s"), "--device", f"{KVSTORE}:KeyValueStore", *options]
    result: subprocess.CompletedProcess[str] = run(library, *arguments)
    assert result.returncode == 2
    assert text in result.stderr
    assert "Traceback" not in result.stderr


FAULTY = """
from vfu_dev.device import Device, Field, Region, Registers
from vfu_dev.errors import AccessError, ConfigError


class Faulty(Device):
    registers = Registers(0, [Field("go", 0, "<u4", "wo", "what to do wrong"),
                              Field("got", 4, "<u4", "rw", "", migrates=True)])
    page = Region(2, size_bytes=4096)

    @registers.written("go")
    def go(self, what: int) -> None:
        if what == 1:
            raise AccessError("not for you")
        if what == 2:
            self.page.store(4090, bytes(8))
        if what == 3:
            raise ConfigError("cannot be")
        if what == 4:
            self.guest_memory.read(0xDEAD0000, memoryview(bytearray(8)))
        if what == 5:
            self.raise_irq(-1)

    def resumed(self) -> None:
        if self.registers["got"] == 1:
            self.page.store(4096, b"x")
"""


def faulty(folder: Path) -> str:
    """Return what serves a device with bugs."""
    (folder / "faulty.py").write_text(FAULTY)
    return f"{folder / 'faulty.py'}:Faulty"


@pytest.mark.parametrize(
    ("what", "number", "error", "line"),
    [
        (1, errno.EINVAL, None, "not for you"),
        (
            2,
            errno.EIO,
            "OutsideRegionError: page: 8 bytes at 0xffa",
            "self.page.store(4090, bytes(8))",
        ),
        (3, errno.EINVAL, "ConfigError: cannot be", 'raise ConfigError("cannot be")'),
        (4, errno.EFAULT, None, "DMA of 8 bytes at 0xdead0000: no DMA region there"),
        (5, None, None, None),
    ],
)
def test_a_defect_of_an_author_is_a_traceback_and_a_refusal_is_a_line(
    serve: ServerFactory, short_tmp: Path, what: int, number: int | None, error: str | None, line: str | None
) -> None:
    server = serve("--device", faulty(short_tmp), memory=None)
    server.has_defect = error is not None
    with server.connect() as device:
        if number is None:
            device.region_write(0, 0, struct.pack("<I", what))
        else:
            with pytest.raises(ClientCommandError) as caught:
                device.region_write(0, 0, struct.pack("<I", what))
            assert caught.value.errno == number
        assert device.region_read(0, 0, 4) == bytes(4)
    log = server.log()
    assert ("Traceback" in log) == (error is not None)
    assert (error or "") in log
    assert (line or "") in log
    assert (" refused: " in log) == (error is None and line is not None)


def test_a_defect_in_resumed_is_a_traceback_and_the_device_does_not_run(
    serve: ServerFactory, short_tmp: Path
) -> None:
    spec = faulty(short_tmp)
    source, target = (serve("--device", spec, memory=None) for _ in range(2))
    target.has_defect = True
    with source.connect() as one, target.connect() as two:
        one.region_write(0, 4, struct.pack("<I", 1))
        with pytest.raises(MigrationError):
            Migrator(one, two, ANY_DOWNTIME).run()
    assert "OutsideRegionError: page: 1 bytes at 0x1000 of 4096" in target.log()
    assert 'self.page.store(4096, b"x")' in target.log()
    assert "Traceback" not in source.log()
