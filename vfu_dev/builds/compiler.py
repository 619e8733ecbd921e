"""The C compiler's version, which is part of every artifact's key."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from functools import cache as memoize
from pathlib import Path

from vfu_dev.builds.cache import Cache, input_key
from vfu_dev.whole import write_whole

# Programs that are the compiler itself, after all links. Others only lead to one (ccache, distcc, a script)
# and stay the same file when it is upgraded.
_COMPILER = re.compile(r"([\w.+-]+-)?(gcc|clang|tcc)(-[\d.]+)?")
_ELF = b"\x7fELF"


@memoize
def compiler_version() -> str:
    """Return the first line of `cc --version`; `none` without a compiler.

    Starting it takes up to 10 ms, so ROOT/compilers/ of the cache remembers the line for each file that was
    asked. Nothing is remembered of a program that only leads to a compiler, nor before anything was built.
    """
    program = _found("cc")
    if program is None:
        return "none"
    memory = _memory(program)
    if memory is not None and (known := _remembered(memory)):
        return known
    version = _ask()
    if memory is not None and version and _memory(program) == memory:  # it was not replaced meanwhile
        with suppress(OSError):  # a cache that is read-only, or none
            _remember(memory, version)
    return version


def _found(name: str) -> str | None:
    """Return the path of the program that execvp(3) would start; None: there is none."""
    paths = (os.path.join(folder, name) for folder in os.get_exec_path())
    return next((path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)), None)


def _ask() -> str:
    from vfu_dev.builds.command import output_of  # here: this asks once, and most processes never

    return output_of(["cc", "--version"]).partition("\n")[0]


def _memory(program: str) -> Path | None:
    """Return the file for the answer of the compiler that `program` is now; None where none is to be kept.

    The name stands for one state of one file. So an answer never changes, and a compiler that was upgraded,
    replaced or written to has another name.
    """
    try:
        path = Path(program).resolve(strict=True)
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if file.read(len(_ELF)) != _ELF or not _COMPILER.fullmatch(path.name):
                return None
    except (OSError, RuntimeError):  # not readable; a circle of links
        return None
    identity = {
        "path": [program, str(path)],  # what it is called as is in its answer
        "file": [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns],
    }
    return Cache().root / "compilers" / input_key(identity)


def _remembered(memory: Path) -> str:
    """Return the answer that is in `memory`; empty: none, or not all of it, as after a loss of power."""
    with suppress(OSError, UnicodeDecodeError):
        line, end, more = memory.read_text().partition("\n")
        return line if end and not more else ""
    return ""


def _remember(memory: Path, version: str) -> None:
    """Write the answer. Processes that do it at once write the same; `_remembered` judges if it is whole."""
    if not Cache().is_empty:  # looking for an artifact makes no cache
        memory.parent.mkdir(exist_ok=True)
        write_whole(memory, f"{version}\n")
