"""An exception in a callback is -1 and errno at the other end of the real library, and a log line here."""

from __future__ import annotations

import errno
import logging
import select
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from serverkit import PATIENCE_SECONDS

from vfu_dev import libvfio_user
from vfu_dev.client import VfioUserDevice
from vfu_dev.errors import AccessError, ConfigError, LibraryError, StateError, StreamError
from vfu_dev.libvfio_user import Context, DeviceCallbacks, RegionSetup, ResetKind, _ffi
from vfu_dev.libvfio_user.dma import GuestMemoryError


class BusyError(AccessError):
    """A refusal with an errno of its own."""

    errno = errno.EBUSY


class Served:
    """A context with one region whose handler raises what a test puts there, served by a thread."""

    def __init__(self, library: Path, path: Path) -> None:
        self.raising: BaseException | None = None
        self.resets: list[ResetKind] = []
        self.context = Context(libvfio_user.open_library(library), str(path), "guarded")
        self.context.setup_pci(express=False)
        self.context.setup_config_region(256, self.access)
        self.context.setup_region(RegionSetup(0, 4096, self.access, "bar0"))
        self.context.setup_callbacks(cast(DeviceCallbacks, self))
        self.context.realize()
        self.stopping = False
        self.thread = threading.Thread(target=self.serve)

    def access(self, data: memoryview, offset: int, is_write: bool) -> None:
        """Raise, or answer with zeros."""
        if self.raising is not None:
            raise self.raising

    def reset(self, kind: ResetKind) -> None:
        """Note it, and raise; nothing else of `DeviceCallbacks` is set up."""
        self.resets.append(kind)
        if self.raising is not None:
            raise self.raising

    def serve(self) -> None:
        """Serve one client until it is gone."""
        attached = False
        while not self.stopping:
            select.select([self.context.poll_fd], [], [], 0.05)
            if not attached:
                attached = self.context.attach()
                continue
            try:
                self.context.run()
            except ConnectionResetError:
                return


@pytest.fixture
def served(library: Path, short_tmp: Path) -> Iterator[tuple[Served, VfioUserDevice]]:
    made = Served(library, short_tmp / "s")
    made.thread.start()
    device = VfioUserDevice.connect(short_tmp / "s", timeout_seconds=PATIENCE_SECONDS)
    yield made, device
    made.raising = None
    device.close()
    made.stopping = True
    made.thread.join(PATIENCE_SECONDS)
    assert not made.thread.is_alive()
    made.context.destroy()


@pytest.mark.parametrize(
    ("raised", "expected", "level"),
    [
        (BusyError("not now"), errno.EBUSY, logging.INFO),
        (StateError("not in STOP"), errno.EINVAL, logging.INFO),
        (StreamError("not a stream"), errno.EINVAL, logging.INFO),
        (GuestMemoryError(errno.EFAULT, 0, 8, "no DMA region there"), errno.EFAULT, logging.INFO),
        (ConfigError("declared wrongly"), errno.EINVAL, logging.ERROR),
        (LibraryError("refused"), errno.ENOSYS, logging.ERROR),
        (IndexError("out of range"), errno.EIO, logging.ERROR),
        (ZeroDivisionError("oops"), errno.EIO, logging.ERROR),
        (KeyboardInterrupt(), errno.EIO, logging.ERROR),
        (MemoryError(), errno.ENOMEM, logging.ERROR),
        (SystemExit(3), errno.EIO, logging.ERROR),
    ],
)
def test_a_raising_region_handler_is_an_error_reply(
    served: tuple[Served, VfioUserDevice],
    caplog: pytest.LogCaptureFixture,
    raised: BaseException,
    expected: int,
    level: int,
) -> None:
    """The client is told errno, the log names device and callback, and the next access works."""
    server, device = served
    server.raising = raised
    with caplog.at_level(logging.INFO, logger="vfu_dev"), pytest.raises(Exception) as caught:  # noqa: PT011
        device.region_read(0, 0, 4)
    assert getattr(caught.value, "errno", None) == expected
    (record,) = [r for r in caplog.records if r.name == "vfu_dev.libvfio_user._ffi"]
    assert record.levelno == level
    assert "guarded: " in record.getMessage()
    assert "bar0" in record.getMessage()
    assert (record.exc_info is not None) == (level == logging.ERROR)
    server.raising = None
    assert device.region_read(0, 0, 4) == bytes(4)


def test_a_raising_reset_is_an_error_reply(served: tuple[Served, VfioUserDevice]) -> None:
    server, device = served
    server.raising = BusyError("not now")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        device.reset()
    assert getattr(caught.value, "errno", None) == errno.EBUSY
    assert server.resets == [ResetKind.DEVICE]
    server.raising = None
    device.reset()


def test_what_is_not_libvfio_user_is_refused_in_words(tmp_path: Path) -> None:
    text = tmp_path / "library.so"
    text.write_text("not a library")
    with pytest.raises(LibraryError, match="cannot open libvfio-user"):
        libvfio_user.open_library(text)
    with pytest.raises(LibraryError, match="not a known libvfio-user"):
        libvfio_user.open_library("libc.so.6")
    assert libvfio_user.describe("libc.so.6")["ok"] is False


def test_our_library_is_recognised(library: Path) -> None:
    found = libvfio_user.describe(library)
    assert (found["ok"], found["api"], found["missing"]) == (True, "ours", [])


@pytest.mark.parametrize(("leave_after", "left"), [(0, 1), (PATIENCE_SECONDS, 0)])
def test_a_call_that_fails_or_is_long_ends_the_turn_of_the_loop(leave_after: float, left: int) -> None:
    leave, raising = _ffi.signed_count(), [False]

    def take(_buffer: int, count: int) -> int:
        if raising[0]:
            raise StreamError("not a stream")
        return count

    callback = _ffi.guard(_ffi.DataCallback, "guarded", "write_data", leave, take, leave_after=leave_after)
    assert callback(None, 1, 8) == 8
    assert leave.value == left
    leave.value, raising[0] = 0, True
    assert callback(None, 1, 8) == -1
    assert leave.value == 1
