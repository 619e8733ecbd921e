"""Reads the headers of an x86-64 ELF file; the file is not run.

The layout is that of <elf.h>: 64-bit, little-endian. The file is not trusted: every offset is checked against
its length.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from vfu_dev.errors import BuildError

_MAGIC = b"\x7fELF"
_ELFCLASS64, _ELFDATA2LSB = 2, 1
_EM_X86_64 = 62
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_STRSZ = 1, 5, 10

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_DYNAMIC = struct.Struct("<qQ")

# A sanitizer's runtime library has to be the first of a process. A static runtime may come anywhere.
_SANITIZER = re.compile(r"lib(asan|tsan|hwasan|clang_rt\.(asan|tsan|hwasan)\b.*)\.so")


class ElfError(BuildError):
    """A file is not an ELF file for x86-64, or its headers contradict each other."""


@dataclass(frozen=True)
class Elf:
    """The headers of one program or library.

    Attributes:
        interpreter: the dynamic loader that the kernel would start; empty for libraries and static programs.
        needed: names of the libraries that it is linked with (DT_NEEDED), in order.
        dynamic: it has a dynamic section; without one, nothing can be preloaded into it.
        sanitizer: the library of `needed` that is a sanitizer's and must be loaded first; empty for none.
    """

    interpreter: str
    needed: tuple[str, ...]
    dynamic: bool
    sanitizer: str

    @property
    def is_static(self) -> bool:
        """Whether it runs without a dynamic loader, so that LD_PRELOAD means nothing to it."""
        return not self.interpreter

    @property
    def is_musl(self) -> bool:
        """Whether its C library is musl."""
        return any("musl" in os.path.basename(name) for name in (self.interpreter, *self.needed))


def read_elf(path: Path) -> Elf:
    """Return the headers of `path`. Raises: ElfError; OSError: it cannot be read."""
    return parse_elf(path.read_bytes(), str(path))


def parse_elf(data: bytes, name: str) -> Elf:
    """Return the headers in `data`; `name` is for the error. Raises: ElfError."""
    if not data.startswith(_MAGIC):
        raise ElfError(f"{name}: not an ELF file")
    try:
        return _parse(data)
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise ElfError(f"{name}: {error}") from error


def _parse(data: bytes) -> Elf:
    ident, _, machine, _, _, table, _, _, _, entry_bytes, entries, _, _, _ = _HEADER.unpack_from(data)
    if ident[4] != _ELFCLASS64 or ident[5] != _ELFDATA2LSB or machine != _EM_X86_64:
        raise ValueError("not a program for x86-64")
    loads: list[tuple[int, int, int]] = []  # virtual address, offset, bytes in the file
    interpreter, dynamic = b"", b""
    has_dynamic = False
    for index in range(entries):
        entry = _PROGRAM_HEADER.unpack_from(data, table + index * entry_bytes)
        kind, _, offset, address, _, size, _, _ = entry
        if kind == _PT_LOAD:
            loads.append((address, offset, size))
        elif kind == _PT_INTERP:
            interpreter = _slice(data, offset, size).rstrip(b"\0")
        elif kind == _PT_DYNAMIC:
            has_dynamic, dynamic = True, _slice(data, offset, size)
    tags = [_DYNAMIC.unpack_from(dynamic, at) for at in range(0, len(dynamic) - 15, _DYNAMIC.size)]
    values = dict(reversed(tags))  # the first of each counts
    strings = b"\0"
    if _DT_STRTAB in values:
        at = _file_offset(loads, values[_DT_STRTAB])
        strings = _slice(data, at, values.get(_DT_STRSZ, 0))
    needed = tuple(_string(strings, value) for tag, value in tags if tag == _DT_NEEDED)
    sanitizer = next((name for name in needed if _SANITIZER.match(name)), "")
    return Elf(interpreter.decode(errors="replace"), needed, has_dynamic, sanitizer)


def _slice(data: bytes, offset: int, size: int) -> bytes:
    if offset > len(data) or size > len(data) - offset:
        raise ValueError("a header points behind the end of the file")
    return data[offset : offset + size]


def _file_offset(loads: list[tuple[int, int, int]], address: int) -> int:
    for start, offset, size in loads:
        if start <= address < start + size:
            return offset + address - start
    raise ValueError("its string table is in no segment")


def _string(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode(errors="replace")
