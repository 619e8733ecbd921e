"""What the binding believes about the ABI is compared with what the C compiler says."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from vfu_dev.libvfio_user import _ffi

STRUCTS = {
    "vfu_dma_info_t": _ffi.DmaInfo,
    "vfu_migration_callbacks_t": _ffi.MigrationCallbacksStruct,
    "vfu_migration_ext_t": _ffi.MigrationExtStruct,
    "vfu_region_memory_t": _ffi.RegionMemoryStruct,
    "struct vfio_precopy_info": _ffi.PrecopyInfoStruct,
    "struct iovec": _ffi.IoVec,
}
# Constants that the header spells the same way.
CONSTANTS = sorted(name for name in vars(_ffi) if name.startswith(("VFU_", "LIBVFIO_USER_")))
# Prototypes, so that the compiler complains when one of them is not what argtypes says.
FUNCTIONS = {
    "vfu_create_ctx": "vfu_ctx_t *(*)(vfu_trans_t, const char *, int, void *, vfu_dev_type_t)",
    "vfu_realize_ctx": "int (*)(vfu_ctx_t *)",
    "vfu_attach_ctx": "int (*)(vfu_ctx_t *)",
    "vfu_get_poll_fd": "int (*)(vfu_ctx_t *)",
    "vfu_run_ctx": "int (*)(vfu_ctx_t *)",
    "vfu_destroy_ctx": "void (*)(vfu_ctx_t *)",
    "vfu_setup_log": "int (*)(vfu_ctx_t *, vfu_log_fn_t *, int)",
    "vfu_setup_region": (
        "int (*)(vfu_ctx_t *, int, size_t, vfu_region_access_cb_t *, int, struct iovec *, uint32_t, int,"
        " uint64_t)"
    ),
    "vfu_setup_device_reset_cb": "int (*)(vfu_ctx_t *, vfu_reset_cb_t *)",
    "vfu_setup_device_nr_irqs": "int (*)(vfu_ctx_t *, enum vfu_dev_irq_type, uint32_t)",
    "vfu_irq_trigger": "int (*)(vfu_ctx_t *, uint32_t)",
    "vfu_pci_init": "int (*)(vfu_ctx_t *, vfu_pci_type_t, int, int)",
    "dma_sg_size": "size_t (*)(void)",
    "vfu_addr_to_sgl": "int (*)(vfu_ctx_t *, vfu_dma_addr_t, size_t, dma_sg_t *, size_t, int)",
    "vfu_sgl_get": "int (*)(vfu_ctx_t *, dma_sg_t *, struct iovec *, size_t, int)",
    "vfu_sgl_put": "void (*)(vfu_ctx_t *, dma_sg_t *, struct iovec *, size_t)",
    "vfu_sgl_read": "int (*)(vfu_ctx_t *, dma_sg_t *, size_t, void *)",
    "vfu_sgl_write": "int (*)(vfu_ctx_t *, dma_sg_t *, size_t, void *)",
    "vfu_setup_device_dma": "int (*)(vfu_ctx_t *, vfu_dma_register_cb_t *, vfu_dma_unregister_cb_t *)",
    "vfu_setup_device_migration_callbacks": "int (*)(vfu_ctx_t *, const vfu_migration_callbacks_t *)",
    "vfu_setup_device_migration_ext": "int (*)(vfu_ctx_t *, const vfu_migration_ext_t *)",
    "vfu_setup_region_memory": "int (*)(vfu_ctx_t *, int, const vfu_region_memory_t *)",
    "vfu_serve_ctx": "int (*)(vfu_ctx_t *, int, int, int, const volatile int *)",
    "vfu_setup_migration_gather": "int (*)(vfu_ctx_t *, vfu_migration_gather_cb_t *)",
    "vfu_setup_migration_window": "int (*)(vfu_ctx_t *, size_t)",
    "vfu_serve_accesses": "int (*)(vfu_ctx_t *)",
    "vfu_migration_get_state": "int (*)(vfu_ctx_t *)",
    "vfu_migration_fail": "int (*)(vfu_ctx_t *)",
    "vfu_reset_device": "int (*)(vfu_ctx_t *, vfu_reset_type_t)",
    "vfu_ext_api_version": "uint32_t (*)(void)",
    "vfu_client_has_precopy_info": "bool (*)(vfu_ctx_t *)",
    "vfu_attach_fd": "int (*)(vfu_ctx_t *, int, const void *, size_t)",
    "vfu_setup_wait_cb": "void (*)(vfu_ctx_t *, vfu_wait_cb_t *)",
    "vfu_dma_access": "int (*)(vfu_ctx_t *, vfu_dma_addr_t, void *, size_t, int)",
    "vfu_irq_get_type": "int (*)(vfu_ctx_t *, uint32_t *)",
    "vfu_irq_set_level": "int (*)(vfu_ctx_t *, bool)",
    "vfu_irq_take_back": "int (*)(vfu_ctx_t *, uint32_t)",
}
# C parameter -> the ctypes type that has to stand for it; every pointer is a c_void_p or says to what.
SCALARS = {
    "int": ctypes.c_int,
    "vfu_trans_t": ctypes.c_int,
    "vfu_dev_type_t": ctypes.c_int,
    "vfu_pci_type_t": ctypes.c_int,
    "vfu_reset_type_t": ctypes.c_int,
    "enum vfu_dev_irq_type": ctypes.c_int,
    "uint8_t": ctypes.c_uint8,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "size_t": ctypes.c_size_t,
    "ssize_t": ctypes.c_ssize_t,
    "bool": ctypes.c_bool,
    "vfu_dma_addr_t": ctypes.c_void_p,  # a pointer in C, though to nothing of ours
    "void": None,
}

PROBE = """
#include <stdio.h>
#include <stddef.h>
#include <stdbool.h>
#include <sys/uio.h>
#include <linux/vfio.h>
#include "libvfio-user.h"
%(checks)s
int main(void)
{
%(prints)s
    return 0;
}
"""


@pytest.fixture(scope="module")
def probe(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Return what a C program compiled against our header prints: name -> number."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (gcc)")
    prints = [f'    printf("{name} %lld\\n", (long long)({name}));' for name in CONSTANTS]
    for c_name, struct in STRUCTS.items():
        key = c_name.replace(" ", "_")
        prints.append(f'    printf("sizeof.{key} %zu\\n", sizeof({c_name}));')
        for field, *_ in struct._fields_:
            prints.append(f'    printf("{key}.{field} %zu\\n", offsetof({c_name}, {field}));')
            prints.append(f'    printf("sizeof.{key}.{field} %zu\\n", sizeof((({c_name} *)0)->{field}));')
    checks = [
        f'_Static_assert(__builtin_types_compatible_p(__typeof__(&{name}), {c_type}), "{name}");'
        for name, c_type in FUNCTIONS.items()
    ]
    folder = tmp_path_factory.mktemp("abi")
    source = folder / "probe.c"
    source.write_text(PROBE % {"checks": "\n".join(checks), "prints": "\n".join(prints)})
    include = library.resolve().parent / "include"
    command = [
        compiler,
        "-std=gnu11",
        "-Wall",
        "-Werror",
        f"-I{include}",
        "-o",
        str(folder / "probe"),
        str(source),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    lines = subprocess.run([folder / "probe"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


def test_constants_are_those_of_the_header(probe: dict[str, int]) -> None:
    assert {name: getattr(_ffi, name) for name in CONSTANTS} == {name: probe[name] for name in CONSTANTS}


@pytest.mark.parametrize("c_name", STRUCTS)
def test_structs_have_the_compilers_layout(probe: dict[str, int], c_name: str) -> None:
    struct = STRUCTS[c_name]
    key = c_name.replace(" ", "_")
    assert ctypes.sizeof(struct) == probe[f"sizeof.{key}"]
    for name, *_ in struct._fields_:
        field = getattr(struct, name)
        assert (field.offset, field.size) == (probe[f"{key}.{name}"], probe[f"sizeof.{key}.{name}"]), name


def test_prototypes_are_those_the_compiler_accepted(probe: dict[str, int]) -> None:
    """The probe's static assertions compared C types with the header; here they are compared with ctypes'."""
    declared = _ffi.PROTOTYPES | _ffi.EXT_PROTOTYPES
    declared["vfu_setup_device_dma"] = _ffi.SETUP_DMA_3
    declared["vfu_setup_device_migration_callbacks"] = _ffi.SETUP_MIGRATION_V2
    assert set(declared) == set(FUNCTIONS)
    for name, (restype, argtypes) in declared.items():
        result, _, parameters = FUNCTIONS[name].partition("(*)")
        expected = [p.strip() for p in parameters.strip("()").split(",") if p.strip() != "void"]
        assert len(argtypes) == len(expected), name
        for given, c_type in [(restype, result.strip()), *zip(argtypes, expected, strict=True)]:
            if c_type in SCALARS:
                assert given is SCALARS[c_type], (name, c_type)
            else:
                assert "*" in c_type, (name, c_type)
                assert ctypes.sizeof(given) == ctypes.sizeof(ctypes.c_void_p), (name, c_type)


def test_every_callback_type_carries_errno() -> None:
    """Without use_errno, what the guard sets never reaches C."""
    types = [value for name, value in vars(_ffi).items() if name.endswith("Callback")]
    assert len(types) == 11
    from_callproc = 0x8  # FUNCFLAG_USE_ERRNO in CPython's ctypes
    assert all(value._flags_ & from_callproc for value in types)
