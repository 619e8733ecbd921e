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
from vfu_dev.socket_paths import CONTROL_SUFFIX, control_path

SAMPLES_KEPT = 3000
# Samples further apart than this belong to different migrations.
GAP_SECONDS = 3.0
_TIMEOUT_SECONDS = 3.0


class Watched:
    """A server's figures as of the last `refresh`.

    Attributes:
        snapshot: None as long as the server has not answered.
        samples: of its migrations, oldest first.
        error: why the last refresh failed, or None.
    """

    def __init__(self, path: Path) -> None:
        self._given = path
        self.path = control_path(path)
        self._foreign: Path | None = None  # where something answers that is no control socket
        self.snapshot: Snapshot | None = None
        self.samples: deque[Sample] = deque(maxlen=SAMPLES_KEPT)
        self.error: str | None = None
        self._sequence = 0
        self._client: ControlClient | None = None

    def refresh(self) -> None:
        """Ask the server, connecting first if need be; never raises for what the server does."""
        try:
            if self._client is None:
                self.path = control_path(self._given)  # a server that came meanwhile has one
                if self.path == self._foreign:
                    return  # a device's socket, most likely: each poll would take its client's place
                self._client = ControlClient(self.path, timeout_seconds=_TIMEOUT_SECONDS)
            more = True
            while more:
                more = self._ask(self._client)
            self.error = None
        except VfuDevError as err:
            self.error = str(err)
            if self._client is not None and self._is_foreign(err):
                self._foreign = self.path
            self.close()

    def _is_foreign(self, error: VfuDevError) -> bool:
        """Return whether what answered with `error` is no control socket; one that is late may be."""
        named_so = self.path != self._given or self.path.suffix == CONTROL_SUFFIX
        return not named_so and self.snapshot is None and not isinstance(error.__cause__, TimeoutError)

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
            "resumes": snapshot.totals.resumes,
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
