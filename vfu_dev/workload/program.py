"""A load bound to one memory: what each phase writes, and when."""

from __future__ import annotations

from vfu_dev.errors import ConfigError
from vfu_dev.workload.pacer import Pacer
from vfu_dev.workload.schedule import schedule_of
from vfu_dev.workload.spec import DEFAULT_PAGE_BYTES, Workload
from vfu_dev.workload.trace import MAX_ROWS, Trace
from vfu_dev.workload.writes import MAX_ZIPF_PLACES, Writes, writes_of


class Program:
    """What a generator carries out.

    Args:
        spec: the load.
        memory_bytes, page_bytes: of the memory it is for.

    Attributes:
        writes: of each phase, None where a phase writes nothing; one for a load without phases.
        asked_rate_bytes: bytes a second on average, also of a trace.

    Raises: ConfigError: the memory is too small; a file cannot be used.
    """

    def __init__(self, spec: Workload, memory_bytes: int, page_bytes: int = DEFAULT_PAGE_BYTES) -> None:
        self.spec = spec
        parts = [phase.load for phase in spec.phases] or [spec]
        self._seconds = [phase.seconds for phase in spec.phases] or None
        files = {part.trace: Trace.read(part.trace) for part in parts if part.trace is not None}
        if sum(len(trace) for trace in files.values()) > MAX_ROWS:
            raise ConfigError(f"the traces of all phases have more than {MAX_ROWS} rows")
        places = [memory_bytes // page_bytes for part in parts if part.pattern == "zipf"]
        if len(places) > 1 and sum(places) > MAX_ZIPF_PLACES:
            raise ConfigError(f"zipf: all phases have {sum(places)} places, the tables {MAX_ZIPF_PLACES}")
        traces = [None if part.trace is None else files[part.trace] for part in parts]
        self.writes: list[Writes | None] = [
            writes_of(part, memory_bytes, page_bytes, trace)
            for part, trace in zip(parts, traces, strict=True)
        ]
        self._timelines = [
            schedule_of(part, page_bytes, trace) for part, trace in zip(parts, traces, strict=True)
        ]
        rates = [
            float(part.write_rate(page_bytes) * part.write_bytes) if trace is None else trace.rate_bytes
            for part, trace in zip(parts, traces, strict=True)
        ]
        weights = self._seconds or [1.0]
        self.asked_rate_bytes = sum(rate * weight for rate, weight in zip(rates, weights, strict=True)) / sum(
            weights
        )

    def pacer(self, start_ns: int, first: int = 0) -> Pacer:
        """Return the pacer of a load that begins now; `first`: see `Pacer`."""
        return Pacer(self._timelines, self._seconds, start_ns=start_ns, first=first)
