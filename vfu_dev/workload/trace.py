"""A recorded load: a CSV file with the columns time, offset and length."""

from __future__ import annotations

import codecs
import io
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vfu_dev.errors import ConfigError
from vfu_dev.workload.spec import MAX_PERIOD_SECONDS, MAX_WRITE_BYTES

COLUMNS = ("time", "offset", "length")
MAX_ROWS = 1_000_000
MAX_FILE_BYTES = 64 << 20
MAX_OFFSET = 1 << 48

_NS = 1_000_000_000


@dataclass(frozen=True)
class Trace:
    """Writes as they were recorded.

    Attributes:
        path: of the file, for messages.
        times: of each write since the start of a round, ns, ascending, shape (n,).
        offsets, lengths: bytes, shape (n,).
        round_ns: length of a round, after which the trace repeats: the time of the last row.
    """

    path: str
    times: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    round_ns: int

    def __len__(self) -> int:
        return len(self.times)

    @property
    def rate_bytes(self) -> float:
        """Bytes a second, over a whole round."""
        return float(self.lengths.sum()) * _NS / self.round_ns

    @classmethod
    def read(cls, path: str | Path) -> Trace:
        """Return what `path` says.

        The first line is `time,offset,length`. Times are seconds since the load began and do not fall;
        offset and length are bytes. The recording loops; the time of its last row is the length of one round.
        A row of length 0 writes nothing.

        Raises: ConfigError: it cannot be read, with the line that is wrong.
        """
        import csv  # here: few loads have a trace

        rows: list[tuple[int, int, int]] = []
        try:
            # Reading a device or a pipe might never end, and the reader may be a server.
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE_BYTES:
                raise ConfigError(f"{path}: not a file of at most {MAX_FILE_BYTES >> 20} MiB")
            with open(path, "rb") as file:
                if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:  # a spreadsheet writes one
                    file.seek(0)
                reader = csv.reader(io.TextIOWrapper(file, encoding="ascii", newline=""))
                if tuple(next(reader, ())) != COLUMNS:
                    raise ConfigError(f"{path}: the first line is not {','.join(COLUMNS)}")
                for row in _rows(reader, str(path)):
                    if rows and row[0] < rows[-1][0]:
                        raise ConfigError(f"{path}: line {reader.line_num}: the time falls")
                    rows.append(row)
                    if len(rows) > MAX_ROWS:
                        raise ConfigError(f"{path}: more than {MAX_ROWS} rows")
        except (OSError, ValueError, csv.Error) as error:
            if isinstance(error, ConfigError):
                raise
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"{path}: cannot be read as a trace: {reason}") from error
        table = np.array(rows, dtype=np.int64).reshape(-1, 3)
        writes = table[table[:, 2] > 0]
        if not len(writes) or table[-1, 0] <= 0:
            raise ConfigError(f"{path}: needs a write, and a last row later than 0 s")
        times, offsets, lengths = (np.ascontiguousarray(column) for column in writes.T)
        return cls(str(path), times, offsets, lengths, int(table[-1, 0]))


def _rows(reader: Iterator[list[str]], path: str) -> Iterator[tuple[int, int, int]]:
    for number, row in enumerate(reader, start=2):
        if not row:
            continue
        try:
            seconds, offset, length = float(row[0]), int(row[1], 0), int(row[2], 0)
            sane = (
                len(row) == len(COLUMNS)
                and math.isfinite(seconds)
                and 0 <= seconds <= MAX_PERIOD_SECONDS
                and 0 <= offset <= MAX_OFFSET
                and 0 <= length <= MAX_WRITE_BYTES
            )
        except (ValueError, IndexError):
            sane = False
        if not sane:
            raise ConfigError(
                f"{path}: line {number}: expected seconds up to {MAX_PERIOD_SECONDS:g}, an offset, and a "
                f"length up to {MAX_WRITE_BYTES}"
            )
        yield round(seconds * _NS), offset, length
