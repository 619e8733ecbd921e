"""The library as a file: what it exports, what it needs, how it is cut up; and what one call costs others."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from preloadkit import preload_of

from vfu_dev.builds import native_dir

SOURCE = native_dir() / "vfio-preload"
# A library built here has to run beside a program from elsewhere. clock_gettime() came to glibc in 2.17.
NEWEST_GLIBC = (2, 17)
MAX_LINES = 400


@pytest.fixture(scope="module")
def library() -> Path:
    return Path(preload_of("plain"))


def symbols(library: Path, defined: bool) -> dict[str, str]:
    """Return name -> version of the dynamic symbols that it defines, or needs."""
    text = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in text.splitlines():
        match = re.match(r"[0-9a-f]{16} (.{7}) (\S+)\t[0-9a-f]{16}\s+(\(?[\w.]*\)?)\s+(\S+)$", line)
        if match and (match[2] != "*UND*") == defined:
            found[match[4]] = match[3].strip("()")
    return found


def interposed() -> set[str]:
    """Return the names in symbols.h."""
    text = (SOURCE / "symbols.h").read_text()
    table = text[text.index("#define SYMBOLS(X)") : text.index("enum symbol")]
    return set(re.findall(r"X\((\w+)\)", table))


def test_nothing_is_exported_but_the_interposed(library: Path) -> None:
    """What else it exported would take the place of a program's own function of that name."""
    assert set(symbols(library, defined=True)) == interposed()


def test_it_needs_the_c_library_alone(library: Path) -> None:
    text = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"\(NEEDED\).*\[(.*)\]", text) == ["libc.so.6"]
    assert "BIND_NOW" in text


def test_it_needs_the_oldest_versions_of_symbols(library: Path) -> None:
    """So that it can be preloaded on systems older than the one that it was built on."""
    needed = symbols(library, defined=False)
    assert len(needed) > 40
    for name, version in needed.items():
        number = re.fullmatch(r"GLIBC_(\d+)\.(\d+)(?:\.\d+)?", version)
        if number:
            assert (int(number[1]), int(number[2])) <= NEWEST_GLIBC, f"{name}@{version}"
        else:
            assert version in ("", "Base"), f"{name}@{version}"


def test_every_symbol_that_qemu_calls_is_interposed() -> None:
    """The list of those that were seen to reach our descriptors, and their fortified and 64-bit names."""
    seen = {
        "ioctl", "pread64", "__pread64_chk", "pwrite64", "read", "write", "close", "open64", "openat64",
        "__open64_2", "mmap64", "access",
    }  # fmt: skip
    assert seen <= interposed()


def test_modules_are_short_and_the_readme_names_each() -> None:
    readme = (SOURCE / "README.md").read_text()
    for path in SOURCE.glob("*.[ch]"):
        assert len(path.read_text().splitlines()) <= MAX_LINES, path.name
        if path.suffix == ".c" and path.name not in ("config.c", "log.c", "user.c"):
            assert f"`{path.name}`" in readme, path.name


def test_the_readme_names_every_variable() -> None:
    """And no other."""
    sources = "".join(path.read_text() for path in SOURCE.glob("*.c"))
    names = {name.replace("%u", "") for name in re.findall(r"VFU_DEV_PRELOAD_\w+(?:%u)?", sources)}
    readme = (SOURCE / "README.md").read_text()
    told = {re.sub(r"\d+$", "", name) for name in re.findall(r"VFU_DEV_PRELOAD_\w+", readme)}
    assert told == {re.sub(r"u$", "", name) if name.endswith(("SOCKETu", "FDu")) else name for name in names}
