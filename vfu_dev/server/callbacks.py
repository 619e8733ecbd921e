"""libvfio-user's callbacks of a served device, answered by the device's migration and its reset."""

from __future__ import annotations

import logging

from vfu_dev.device import Device
from vfu_dev.errors import REFUSALS
from vfu_dev.figures import Interruption
from vfu_dev.libvfio_user import Context, Library, ResetKind
from vfu_dev.memory.kernels import Vectors
from vfu_dev.migration.save import Others
from vfu_dev.uapi import VFIO_PRECOPY_INFO_REINIT, DeviceState

logger = logging.getLogger(__name__)


class ServedCallbacks:
    """The `DeviceCallbacks` of `device`, served by `context`."""

    def __init__(self, device: Device, context: Context, library: Library) -> None:
        self._device = device
        self._context = context
        self._library = library

    def reset(self, kind: ResetKind) -> None:
        """Follow a reset that the client asked for, or a lost connection."""
        device = self._device
        if kind is ResetKind.LOST_CONNECTION:
            logger.info("%s: the client is gone", device.name)
            device.reset(DeviceState.RUNNING, Interruption.DISCONNECTED)
            device.migration.client_knows_reinit = False
            return
        # Ours has updated its state before it calls; a foreign library does not tell, and the newer ones
        # (4f4fce4) leave the state alone.
        state = self._context.migration_state()
        if state is None:
            state = device.migration.state
            if state is DeviceState.ERROR:
                state = DeviceState.RUNNING
        logger.info("%s: reset by the client (%s)", device.name, kind.name)
        device.reset(state, f"{Interruption.RESET}: {kind.name}")

    def arc(self, target: DeviceState) -> None:
        """Go along an arc that the library chose; an unforeseen failure leads to ERROR."""
        migration = self._device.migration
        try:
            if self._library.is_ours:
                migration.arc(target)
            else:
                # Its idea of single arcs, and of what a reset does, may differ from ours.
                migration.set_state(target)
        except REFUSALS:
            raise
        except Exception as err:
            self._context.fail_migration()
            migration.fail(f"{type(err).__name__}: {err}")
            raise

    def read_into(self, buffer: memoryview) -> int:
        """Serve MIG_DATA_READ."""
        return self._device.migration.read_into(
            buffer, Others(self._context.poll_fd, self._context.serve_accesses)
        )

    def gather(self, count: int) -> Vectors | None:
        """Serve MIG_DATA_READ without a copy."""
        return self._device.migration.read(count)

    def write(self, data: memoryview) -> None:
        """Serve MIG_DATA_WRITE."""
        self._device.migration.write(data)

    def precopy_sizes(self) -> tuple[int, int, int]:
        """Serve MIG_GET_PRECOPY_INFO; only a client that opted in gets the flags."""
        migration = self._device.migration
        info = migration.precopy_info(by_client=True)
        flags = VFIO_PRECOPY_INFO_REINIT if migration.take_reinit() else 0
        return info.initial_bytes, info.dirty_bytes, flags

    def stop_copy_length(self) -> int:
        """Serve MIG_DATA_SIZE."""
        return self._device.migration.stop_copy_length()

    def opt_in(self, enabled: bool) -> None:
        """Note VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2; it holds as long as the connection."""
        self._device.migration.client_knows_reinit = enabled
