"""The device's registers in a guest without a CPU, wherever that guest is now."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from labkit import MIB, begin_and_stay, dirtying, let_go

from vfu_dev.device.reference.layout import FIELDS
from vfu_dev.lab.lab import Lab
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.vm.qtest_guest import QtestGuest

Options = Callable[..., MigrateOptions]

OFFSETS = {field.name: (field.offset, int(field.format[-1])) for field in FIELDS if field.format[1] == "u"}


def moving(options: Options, devices: int = 1) -> MigrateOptions:
    """Return options under which guest memory is sent while the device writes to it, and still converges."""
    return options(
        devices=devices,
        load=dirtying(0),
        max_bandwidth=64 * MIB,
        switchover_bandwidth=64 * MIB,
        downtime_limit_ms=300,
        warmup_seconds=0.0,
    )


class Registers:
    """The registers of one device of the lab's guest, wherever the guest is now."""

    def __init__(self, lab: Lab, index: int = 0) -> None:
        assert isinstance(lab.guest, QtestGuest)
        self.guest = lab.guest
        self.device = lab.guest.devices[index]

    async def get(self, name: str) -> int:
        """Read a register."""
        offset, width = OFFSETS[name]
        assert self.guest.client is not None
        return await self.guest.client.read(width, self.device.bar0 + offset)

    async def set(self, **values: int) -> None:
        """Write registers, in the order given."""
        assert self.guest.client is not None
        for name, value in values.items():
            offset, width = OFFSETS[name]
            await self.guest.client.write(width, self.device.bar0 + offset, value)

    async def config(self, offset: int) -> int:
        """Read a word of configuration space."""
        assert self.guest.client is not None
        return await self.guest.client.config_read(self.device.slot, offset)


async def migrate(lab: Lab, meanwhile: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
    """Move the VM; the guest follows. It does not stop before `meanwhile` is over."""
    if meanwhile is None:
        await lab.configure()
        await lab.begin(await lab.listen())
    else:
        await begin_and_stay(lab)
        await meanwhile()
        await let_go(lab)
    row = await lab.wait_final()
    assert row["status"] == "completed", row
    await lab.wait_running(lab.destination.qemu)
    await lab.guest.follow(lab.destination.qemu)
