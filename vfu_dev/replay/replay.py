"""One device's replay: what `serve --profile` adds to it."""

from __future__ import annotations

import logging
from dataclasses import asdict

from vfu_dev.device import Device
from vfu_dev.libvfio_user import DeviceCallbacks
from vfu_dev.profile import Profile
from vfu_dev.profile.model import DmaLogging
from vfu_dev.replay.pace import Hold, PacedCallbacks
from vfu_dev.replay.scale import scaled
from vfu_dev.replay.session import ReplaySessions
from vfu_dev.uapi import MigrationFlags

logger = logging.getLogger(__name__)

_FLAGS = {"pre_copy": MigrationFlags.VFIO_MIGRATION_PRE_COPY, "p2p": MigrationFlags.VFIO_MIGRATION_P2P}


class Replay:
    """Makes `device` behave as `profile` says, before it is served.

    Args: scale: what sizes and rates are divided by.

    Attributes:
        profile: as scaled.
    """

    def __init__(self, device: Device, profile: Profile, scale: int = 1) -> None:
        self.profile = scaled(profile, scale)
        self.scale = scale
        self._device = device
        without = MigrationFlags(0)
        for name, flag in _FLAGS.items():
            has = getattr(profile.features, name)
            if has is not None and not has.value:
                without |= flag
        device.restrict_flags(~without)
        if profile.dma_logging != DmaLogging():
            logger.info(
                "%s: the profile's DMA logging is not replayed: the log is the library's", device.name
            )
        self.sessions = ReplaySessions(self.profile, device.migration)
        self._paced: PacedCallbacks | None = None

    def around(self, callbacks: DeviceCallbacks, hold: Hold) -> PacedCallbacks:
        """Return what the server is to call instead of `callbacks`."""
        self._paced = PacedCallbacks(self.profile, self.sessions, self._device.migration, hold, callbacks)
        return self._paced

    @property
    def kept(self) -> bool:
        """Whether every size and time so far was as the profile says."""
        late = 0 if self._paced is None else self._paced.pace.late_calls
        return not late and not self.sessions.overshoot_bytes

    def status(self) -> dict[str, object]:
        """Return what `status` of the control socket says of it."""
        pace = {} if self._paced is None else asdict(self._paced.pace)
        return {
            "profile": self.profile.name,
            "scale": self.scale,
            "kept": self.kept,
            "overshoot_bytes": self.sessions.overshoot_bytes,
            **pace,
        }
