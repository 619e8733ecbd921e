"""One server that is watched through its control socket; it may come and go."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vfu_dev.client import ControlClient
from vfu_dev.errors import ProtocolError, VfuDevError
from vfu_dev.figures import Figures, Sample, Snapshot, verdict

SAMPLES_KEPT = 3000
# Samples further apart than this belong to different migrations.
GAP_SECONDS = 3.0
_TIMEOUT_SECONDS = 3.0


def control_path(path: Path) -> Path:
    """Return the control socket meant by `path`: its own, or the one beside a vfio-user socket.

    PATH.ctl and then PATH with the suffix .ctl are looked for first: a connection to a vfio-user socket would
    take the place of its one client.
    """
    for beside in (path.with_name(path.name + ".ctl"), path.with_suffix(".ctl")):
        if beside.is_socket():
            return beside
    return path


class Watched:
    """A server's figures as of the last `refresh`.

    Attributes:
        snapshot: None as long as the server has not answered.
        samples: of its migrations, oldest first.
        error: why the last refresh failed, or None.
    """

    def __init__(self, path: Path) -> None:
        self.path = control_path(path)
        self.snapshot: Snapshot | None = None
        self.samples: deque[Sample] = deque(maxlen=SAMPLES_KEPT)
        self.error: str | None = None
        self._sequence = 0
        self._client: ControlClient | None = None

    def refresh(self) -> None:
        """Ask the server, connecting first if need be; never raises for what the server does."""
        try:
            if self._client is None:
                self._client = ControlClient(self.path, timeout_seconds=_TIMEOUT_SECONDS)
            more = True
            while more:
                more = self._ask(self._client)
            self.error = None
        except VfuDevError as err:
            self.error = str(err)
            self.close()

    def _ask(self, client: ControlClient) -> bool:
        answer = client.command("figures", after=self._sequence)
        try:
            figures = Figures.from_dict(answer)
        except (TypeError, KeyError, ValueError) as err:
            raise ProtocolError(f"{self.path} answered figures of another version: {err}") from err
        if figures.sequence < self._sequence:
            self.samples.clear()  # another server, from its first sample on
        self._sequence = figures.sequence
        self.snapshot = figures.snapshot
        self.samples.extend(figures.samples)
        return figures.more

    def latest(self) -> list[Sample]:
        """Return the samples of the migration that runs, or of the last one."""
        samples = list(self.samples)
        first = len(samples) - 1
        while first > 0 and samples[first].time - samples[first - 1].time < GAP_SECONDS:
            first -= 1
        return samples[max(0, first) :]

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints for this server."""
        if self.snapshot is None or self.error is not None:
            return {"control": str(self.path), "error": self.error}
        snapshot = self.snapshot
        return {
            "control": str(self.path),
            "error": None,
            "device": snapshot.device,
            "state": snapshot.state,
            "connected": snapshot.connected,
            "verdict": verdict(snapshot),
            **snapshot.forecast,
            "last_downtime_seconds": snapshot.last_downtime_seconds,
            "last_predicted_downtime_seconds": snapshot.last_predicted_downtime_seconds,
            "passes": snapshot.totals.passes,
            "sent_bytes": snapshot.totals.sent_bytes,
            "received_bytes": snapshot.totals.received_bytes,
            "saves": snapshot.totals.saves,
            "loads": snapshot.totals.loads,
            "counters": snapshot.counters,
        }

    def close(self) -> None:
        """Hang up; the next refresh connects again."""
        if self._client is not None:
            self._client.close()
            self._client = None


def refresh_all(watched: Sequence[Watched]) -> None:
    """Refresh all at once, so that one that hangs does not hold up the others' turn."""
    with ThreadPoolExecutor(max_workers=max(1, len(watched))) as pool:
        list(pool.map(Watched.refresh, watched))
