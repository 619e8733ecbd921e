"""Configuration space over the wire: capabilities, sizing, power states, conventional devices, migration."""

from __future__ import annotations

import errno

import pcikit
import pytest
from serverkit import ServerFactory, wait_until
from streamkit import resume, save

from vfu_dev.client import ClientCommandError, VfioUserDevice
from vfu_dev.device.reference.layout import WriterStatus

CONFIG = 7
WRITER_LENGTH, WRITER_RATE, WRITER_CTRL, WRITER_STATUS, WRITER_COUNT = 0xA0, 0xA8, 0xB0, 0xB4, 0xB8


def test_an_express_endpoint_with_function_level_reset(device: VfioUserDevice) -> None:
    """4 KiB of configuration space, no extended capabilities; all others lie inside the first 256 bytes."""
    assert device.region_info(CONFIG).size_bytes == 4096
    found = pcikit.capabilities(device)
    assert {pcikit.CAP_PM, pcikit.CAP_EXP, pcikit.CAP_MSIX} <= set(found)
    express = found[pcikit.CAP_EXP]
    assert pcikit.read(device, express + 2) & 0xFF == 0x02  # version 2, endpoint
    assert pcikit.read(device, express + 4, 4) & 1 << 28, "no function level reset"
    assert pcikit.read(device, pcikit.STATUS) & 0x10
    assert pcikit.read(device, 0x100, 4) == 0


def test_a_conventional_function_where_asked_for(serve: ServerFactory) -> None:
    """256 bytes, without PCI Express; the bytes beyond do not exist."""
    with serve("--pci", "conventional").connect() as device:
        assert device.region_info(CONFIG).size_bytes == 256
        assert pcikit.CAP_EXP not in pcikit.capabilities(device)
        assert pcikit.CAP_PM in pcikit.capabilities(device)
        with pytest.raises(ClientCommandError) as caught:
            device.region_read(CONFIG, 254, 4)
        assert caught.value.errno == errno.EINVAL


def test_bars_tell_their_sizes(device: VfioUserDevice) -> None:
    """All ones written read back as the size mask with the type bits: PCI 3.0, section 6.2.5.1."""
    for index, wide in ((0, False), (2, True), (4, False)):
        at = pcikit.BAR0 + 4 * index
        size = device.region_info(index).size_bytes
        flags = pcikit.read(device, at, 4)
        assert flags == (0xC if wide else 0)
        pcikit.write(device, at, 0xFFFFFFFF, 4)
        assert pcikit.read(device, at, 4) == (-size & 0xFFFFFFFF) | flags
        if wide:
            pcikit.write(device, at + 4, 0xFFFFFFFF, 4)
            assert pcikit.read(device, at + 4, 4) == 0xFFFFFFFF
    pcikit.write(device, pcikit.BAR0 + 4, 0xFFFFFFFF, 4)
    assert pcikit.read(device, pcikit.BAR0 + 4, 4) == 0, "there is no BAR1"


@pytest.mark.parametrize("width", [1, 2, 4])
def test_identity_and_capabilities_cannot_be_written(device: VfioUserDevice, width: int) -> None:
    """Writes of any width are taken, and change no bit that is not the guest's."""
    before = device.region_read(CONFIG, 0, 256)
    for pattern in (0x00, 0xFF):
        for offset in range(0, 256, width):
            data = bytes([pattern]) * width
            control = pcikit.capabilities(device)[pcikit.CAP_EXP] + pcikit.EXP_DEVCTL
            if offset <= control + 1 < offset + width:
                data = data[: control + 1 - offset] + bytes([pattern & 0x7F]) + data[control + 2 - offset :]
            device.region_write(CONFIG, offset, data)
        seen = device.region_read(CONFIG, 0, 256)
        for offset in (*range(4), *range(6, 12), *range(0x2C, 0x30), 0x34):
            assert seen[offset] == before[offset], hex(offset)
        found = pcikit.capabilities(device)
        assert list(found) == [before[offset] for offset in found.values()]


def test_power_states(device: VfioUserDevice) -> None:
    """D3hot and back lose nothing; D1 and D2, which there are not, change nothing."""
    control = pcikit.capabilities(device)[pcikit.CAP_PM] + pcikit.PM_CTRL
    device.region_write(0, 0x100, b"\x77" * 8)
    pcikit.write(device, pcikit.COMMAND, 0x6)
    assert pcikit.read(device, control) == 0x8, "D0, and no soft reset"
    for state, expected in ((1, 0), (2, 0), (3, 3), (2, 3), (1, 3), (0, 0)):
        pcikit.write(device, control, state)
        assert pcikit.read(device, control) & 3 == expected
    assert device.region_read(0, 0x100, 8) == b"\x77" * 8
    assert pcikit.read(device, pcikit.COMMAND) == 0x6


def test_what_a_guest_wrote_migrates(serve: ServerFactory) -> None:
    """Command register, BARs, interrupt line, power state, device and link control, MSI-X control."""
    source, target = serve(), serve()
    with source.connect() as device, target.connect() as other:
        found = pcikit.capabilities(device)
        pcikit.write(device, pcikit.COMMAND, 0x0546)
        pcikit.write(device, pcikit.CACHE_LINE_SIZE, 0x10, 1)
        pcikit.write(device, pcikit.INTERRUPT_LINE, 0x2B, 1)
        pcikit.write(device, pcikit.BAR0, 0xFEB0_0000, 4)
        pcikit.write(device, pcikit.BAR0 + 12, 0x38, 4)
        pcikit.write(device, found[pcikit.CAP_EXP] + pcikit.EXP_DEVCTL, 0x504F)
        pcikit.write(device, found[pcikit.CAP_EXP] + pcikit.EXP_LNKCTL, 0x0040)
        pcikit.write(device, found[pcikit.CAP_MSIX] + pcikit.MSIX_FLAGS, 0xC000)
        pcikit.write(device, found[pcikit.CAP_PM] + pcikit.PM_CTRL, 3)
        # As QEMU does on its way: the state's word is the last.
        pcikit.write(other, pcikit.COMMAND, 0x0002)
        assert other.region_read(CONFIG, 0, 4096) != device.region_read(CONFIG, 0, 4096)
        resume(other, save(device))
        assert other.region_read(CONFIG, 0, 4096) == device.region_read(CONFIG, 0, 4096)


def test_a_device_without_power_moves_nothing(device: VfioUserDevice) -> None:
    """In D3hot a function starts no DMA, whatever its command register says (PCI-PM 1.2, 5.4.1)."""
    control = pcikit.capabilities(device)[pcikit.CAP_PM] + pcikit.PM_CTRL
    device.dma_map(0, 1 << 16)
    pcikit.write(device, pcikit.COMMAND, 0x6)
    device.region_write(0, WRITER_LENGTH, (1 << 16).to_bytes(8, "little"))
    device.region_write(0, WRITER_RATE, (1 << 20).to_bytes(8, "little"))
    device.region_write(0, WRITER_CTRL, b"\x01\0\0\0")
    wait_until(lambda: writer(device, WRITER_COUNT), "the writer writes in D0")
    pcikit.write(device, control, 3)
    stopped = WriterStatus.NO_BUS_MASTER
    wait_until(lambda: writer(device, WRITER_STATUS) == stopped, "the writer is stopped in D3hot")
    device.region_write(0, WRITER_CTRL, b"\x01\0\0\0")
    wait_until(lambda: writer(device, WRITER_STATUS) == stopped, "it cannot begin there either")
    assert writer(device, WRITER_COUNT) == 0


def writer(device: VfioUserDevice, register: int) -> int:
    return int.from_bytes(device.region_read(0, register, 4), "little")
