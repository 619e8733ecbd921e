"""ELF headers: what they say of real programs, and that a damaged file is an error and nothing else."""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from pathlib import Path

import debkit
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfu_dev.builds.elf import ElfError, parse_elf, read_elf

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc (gcc)")
MAIN = "int main(void) { return 0; }"


def test_a_dynamic_program_names_its_loader_and_libraries() -> None:
    elf = read_elf(Path(sys.executable).resolve())
    assert elf.interpreter.endswith("/ld-linux-x86-64.so.2")
    assert "libc.so.6" in elf.needed
    assert (elf.dynamic, elf.is_static, elf.is_musl, elf.sanitizer) == (True, False, False, "")


@needs_cc
def test_static_musl_and_sanitized_programs_are_told_apart(tmp_path: Path) -> None:
    """musl's loader is written over glibc's in a copy: the file is only looked at."""
    assert read_elf(debkit.compile_c(tmp_path / "static", MAIN, "-static")).is_static
    assert read_elf(debkit.compile_c(tmp_path / "pie", MAIN, "-static-pie")).is_static
    for flag, name in (("address", "libasan.so."), ("thread", "libtsan.so.")):
        elf = read_elf(debkit.compile_c(tmp_path / flag, MAIN, f"-fsanitize={flag}"))
        assert elf.sanitizer.startswith(name)
    linked_in = debkit.compile_c(tmp_path / "linked-in", MAIN, "-fsanitize=address", "-static-libasan")
    assert read_elf(linked_in).sanitizer == "", "it does not mind"
    glibc, musl = b"/lib64/ld-linux-x86-64.so.2\0", b"/lib/ld-musl-x86_64.so.1\0"
    plain = debkit.compile_c(tmp_path / "plain", MAIN)
    data = plain.read_bytes()
    assert glibc in data
    plain.write_bytes(data.replace(glibc, musl.ljust(len(glibc), b"\0")))
    assert read_elf(plain).is_musl


def test_what_is_no_elf_file_is_said(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    with pytest.raises(ElfError, match="not an ELF file"):
        read_elf(script)
    other = bytearray(Path(sys.executable).resolve().read_bytes()[:64])
    other[18] = 183  # EM_AARCH64
    script.write_bytes(other)
    with pytest.raises(ElfError, match="not a program for x86-64"):
        read_elf(script)


SMALL = Path("/lib/x86_64-linux-gnu/libdl.so.2")


@pytest.mark.skipif(not SMALL.is_file(), reason=f"needs {SMALL} (libc6)")
@given(st.data())
def test_damaged_headers_are_an_error_and_never_anything_else(data: st.DataObject) -> None:
    """Cut anywhere, with any bytes of the headers replaced."""
    content = bytearray(SMALL.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, 1023))] = data.draw(st.integers(0, 255))
    cut = bytes(content[: data.draw(st.integers(0, len(content)))])
    with suppress(ElfError):
        parse_elf(cut, "damaged")


@pytest.mark.skipif(not SMALL.is_file(), reason=f"needs {SMALL} (libc6)")
def test_an_offset_beyond_what_python_counts_is_an_error_too() -> None:
    """Of the program headers: 64 bits, of which the highest is set."""
    content = bytearray(SMALL.read_bytes())
    content[39] = 0x80
    with pytest.raises(ElfError, match="damaged"):
        parse_elf(bytes(content), "damaged")
