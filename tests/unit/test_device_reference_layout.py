"""The layout of the reference device is written once; what cannot import it says the same."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import vfu_dev
from vfu_dev.builds.native import native_dir
from vfu_dev.device.reference import layout
from vfu_dev.device.reference.layout import DESCRIPTOR, REGISTERS, Op, Status
from vfu_dev.workload.splitmix import outputs

PACKAGE = Path(vfu_dev.__file__).parent
GUEST = native_dir() / "guest"
SEED = 0xFEDC_BA98_7654_3210

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")


def defined() -> dict[str, str]:
    """Return what every `#define` of the guest's C stands for."""
    texts = [path.read_text() for path in (*GUEST.rglob("*.h"), *GUEST.rglob("*.c"))]
    return dict(
        found for text in texts for found in re.findall(r"^#define (\w+) ([^/\n]+?) *(?:/|$)", text, re.M)
    )


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C compiler makes of the guest's headers: constants, places in a descriptor, random numbers."""
    names = [
        name
        for name in defined()
        if re.match(r"REG_(?!INTX)|CTRL_RESET|ID_VALUE|FLAG_INTERRUPT|SCRATCH_W", name)
    ]
    names += [f"OP_{op.name}" for op in Op] + ["STATUS_IDLE", "STATUS_BUSY", "STATUS_DONE"]
    lines = [f'    printf("{name} %llu\\n", (unsigned long long){name});' for name in names]
    assert DESCRIPTOR.names
    lines += [f'    printf("{one} %zu\\n", offsetof(struct descriptor, {one}));' for one in DESCRIPTOR.names]
    lines.append('    printf("descriptor %zu\\n", sizeof(struct descriptor));')
    for number in range(3):
        term = f"{SEED:#x}ull + {number + 1} * GOLDEN"
        lines.append(f'    printf("random{number} %llu\\n", (unsigned long long)mix({term}));')
    path = tmp_path_factory.mktemp("layout")
    source = [
        "#include <stdio.h>",
        '#include "engine.h"',
        '#include "mix.h"',
        "int main(void)",
        "{",
        *lines,
        "}",
    ]
    (path / "probe.c").write_text("\n".join(source) + "\n")
    subprocess.run(
        ["cc", "-std=gnu11", "-I", GUEST / "vfud-load", "-o", path / "probe", path / "probe.c"], check=True
    )
    said = subprocess.run([path / "probe"], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in (line.split() for line in said.splitlines())}


@needs_compiler
def test_the_guests_headers_have_the_same_registers(values: dict[str, int]) -> None:
    registers = {name: value for name, value in values.items() if name.startswith("REG_")}
    assert len(registers) > 15
    assert registers == {name: REGISTERS[name.removeprefix("REG_").lower()].offset for name in registers}
    assert values["ID_VALUE"] == layout.REGISTER_ID
    assert values["CTRL_RESET"] == layout.CTRL_RESET
    assert 8 * values["SCRATCH_WORDS"] == REGISTERS["scratch"].size_bytes


@needs_compiler
def test_the_guests_headers_have_the_same_descriptor(values: dict[str, int]) -> None:
    assert DESCRIPTOR.fields is not None
    assert {name: values[name] for name in DESCRIPTOR.fields} == {
        n: f[1] for n, f in DESCRIPTOR.fields.items()
    }
    assert values["descriptor"] == DESCRIPTOR.itemsize
    assert values["FLAG_INTERRUPT"] == layout.FLAG_INTERRUPT
    assert {op.name: values[f"OP_{op.name}"] for op in Op} == {op.name: op.value for op in Op}
    for status in (Status.IDLE, Status.BUSY, Status.DONE):
        assert values[f"STATUS_{status.name}"] == status


@needs_compiler
def test_the_guests_random_numbers_are_the_same(values: dict[str, int]) -> None:
    assert [values[f"random{number}"] for number in range(3)] == outputs(SEED, 0, 3).tolist()


def test_constants_in_the_guests_sources_are_the_same() -> None:
    """Those that no header shows: of the kernel module, the engine and the check of the writer."""
    found = {
        name: int(re.sub("[uUlL]+$", "", text), 0) for name, text in defined().items() if text[0].isdigit()
    }
    assert found["VFUD_VENDOR"] == layout.VENDOR_ID
    assert found["VFUD_DEVICE"] == layout.DEVICE_ID
    assert found["REG_INTX_CAUSES"] == REGISTERS["intx_causes"].offset
    assert found["CTRL_START"] == layout.CTRL_START
    assert found["STAMP_SEED"] == layout.STAMP_SEED
    assert found["STAMP_PAGE"] == layout.STAMP_PAGE_BYTES


def test_the_guest_reads_and_writes_registers_in_their_size() -> None:
    accesses = set()
    for path in GUEST.rglob("*.c"):
        accesses |= set(re.findall(r"\b(?:read|write)(32|64)\(\w+, REG_(\w+)[,)]", path.read_text()))
    assert len(accesses) > 12
    sizes = {name: 8 * REGISTERS[name.lower()].size_bytes for _, name in accesses if name != "SCRATCH"}
    assert {name: int(bits) for bits, name in accesses if name in sizes} == sizes


def test_a_descriptor_in_registers_has_the_layout_of_one_in_memory() -> None:
    assert DESCRIPTOR.fields is not None
    first = REGISTERS["desc_op"].offset
    for name, (form, offset, *_) in DESCRIPTOR.fields.items():
        register = REGISTERS[f"desc_{name}"]
        assert (register.offset - first, register.dtype) == (offset, np.dtype(form))


def test_no_other_module_writes_an_id_of_the_device() -> None:
    """Whoever needs one needs the layout."""
    ids = {layout.DEVICE_ID, layout.REGISTER_ID, layout.STAMP_SEED, layout.DEVICE_ID << 16 | layout.VENDOR_ID}
    modules = [path for path in PACKAGE.rglob("*.py") if path != Path(layout.__file__)]
    assert len(modules) > 200
    writes = {
        path.name: node.value
        for path in modules
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value in ids
    }
    assert writes == {}
