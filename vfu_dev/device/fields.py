"""Register tables: fields, and the checks of a table."""

from __future__ import annotations

import contextlib
import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np

from vfu_dev.errors import ConfigError, shown

# INTx has a cause for each bit of a 32-bit register, see `Interrupts`.
_CAUSES_BYTES = 4
# Size in bytes -> what module struct calls a signed integer of that size.
_STRUCT_CODES = {1: "b", 2: "h", 4: "i", 8: "q"}


class Access(StrEnum):
    """What a guest can do with a register."""

    READ_ONLY = "ro"  # reads the stored value, writes are dropped
    READ_WRITE = "rw"  # a write is stored, then the hook is called
    WRITE_ONLY = "wo"  # reads zero, only the hook gets the value
    INTX = "intx"  # reads the causes of INTx; ones written acknowledge them


@dataclass(frozen=True)
class Field:
    """One register.

    Attributes:
        offset: in the BAR.
        format: a numpy dtype, little endian: an integer ("<u4", "<u8", "<i2"), or "V256" for plain bytes.
        access: an `Access`, or its value: "ro", "rw", "wo", "intx" (the device then has INTx).
        migrates: whether its value is part of the device's state.
        survives_reset: whether a device reset leaves it alone.
        doc: what it is for.
        default: the value of a register that migrates when the state comes from a version of the device that
            did not have it; None if such a state is to be refused.

    Raises: ConfigError: one of these is impossible; the text names the register.
    """

    name: str
    offset: int
    format: str
    access: str
    doc: str
    migrates: bool = False
    survives_reset: bool = False
    default: int | bytes | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"register {self.name!r}: a register needs a name")
        try:
            object.__setattr__(self, "access", Access(self.access))
        except ValueError:
            words = ", ".join(Access)
            raise ConfigError(
                f"register {self.name}: access {self.access!r}: expected one of {words}"
            ) from None
        if not isinstance(self.offset, int) or self.offset < 0:
            raise ConfigError(
                f"register {self.name}: offset {self.offset!r}: expected a number of bytes from 0 on"
            )
        self._judge_format()
        if self.default is not None:
            self.judge(self.default, "default")

    def _judge_format(self) -> None:
        what = f"register {self.name}: format {self.format!r}"
        try:
            dtype = self.dtype
        except Exception as err:  # numpy raises TypeError, ValueError or SyntaxError, by the kind of mistake
            raise ConfigError(f"{what}: {err}") from err
        if dtype.newbyteorder("<") != dtype:
            raise ConfigError(f"{what}: registers are little endian: write < in the place of >")
        single = dtype.names is None and dtype.subdtype is None and dtype.itemsize > 0
        if not single or dtype.kind not in "uiV":
            raise ConfigError(f"{what}: expected an integer such as <u4, or V256 for plain bytes")
        if self.access is Access.INTX and (dtype.kind != "u" or dtype.itemsize < _CAUSES_BYTES):
            raise ConfigError(f"{what}: the causes of INTx need <u4 or <u8")

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The format as numpy has it."""
        return np.dtype(self.format)

    @property
    def size_bytes(self) -> int:
        """Size of the register."""
        return self.dtype.itemsize

    @property
    def end(self) -> int:
        """Offset of the first byte after the register."""
        return self.offset + self.dtype.itemsize

    @cached_property
    def codec(self) -> struct.Struct:
        """Between the bytes of the register and its value: an int, of "V" format bytes."""
        if self.dtype.kind == "V":
            return struct.Struct(f"<{self.dtype.itemsize}s")
        code = _STRUCT_CODES[self.dtype.itemsize]
        return struct.Struct("<" + (code.upper() if self.dtype.kind == "u" else code))

    def encode(self, value: Any) -> bytes:
        """Return the bytes of the register for `value`; for a "V" format, zeros follow what is too short.

        Raises: OverflowError: it does not fit.
                TypeError: it is neither an integer nor, for a "V" format, bytes.
        """
        plain = self.dtype.kind == "V"
        try:
            given: Any = bytes(memoryview(value)) if plain else operator.index(value)
        except TypeError as err:
            raise TypeError(f"register {self.name} ({self.format}): {err}") from None
        # pack() would cut bytes that are too many.
        if not plain or len(given) <= self.dtype.itemsize:
            with contextlib.suppress(struct.error):
                return self.codec.pack(given)
        raise OverflowError(f"register {self.name}: {shown(value)} does not fit in {self.format}")

    def judge(self, value: Any, what: str) -> None:
        """Find out whether `value` is one that the register can have.

        Raises: ConfigError: it is not; `what` says which value it is.
        """
        try:
            self.encode(value)
        except (OverflowError, TypeError) as err:
            raise ConfigError(f"{err} ({what})") from err


def layout(where: str, fields: Sequence[Field], size_bytes: int) -> np.dtype[Any]:
    """Return a table of registers as a numpy dtype of `size_bytes`.

    Raises: ConfigError: two registers with one name or at one place, or one that ends beyond the BAR. The
            text names them, and `where` they are.
    """
    names: set[str] = set()
    before: Field | None = None
    for field in sorted(fields, key=lambda one: one.offset):
        if field.name in names:
            raise ConfigError(f"{where}: two registers with the name {field.name}")
        if before is not None and field.offset < before.end:
            raise ConfigError(
                f"{where}: register {field.name} at {field.offset:#x} overlaps {before.name}, "
                f"which ends at {before.end:#x}"
            )
        if field.end > size_bytes:
            raise ConfigError(
                f"{where}: register {field.name} ends at {field.end:#x}, beyond the BAR of {size_bytes} bytes"
            )
        names.add(field.name)
        before = field
    return np.dtype(
        {
            "names": [field.name for field in fields],
            "formats": [field.dtype for field in fields],
            "offsets": [field.offset for field in fields],
            "itemsize": size_bytes,
        }
    )
