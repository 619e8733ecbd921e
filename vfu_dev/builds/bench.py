"""The client and the peer of `vfu-dev bench`, both in C; changes of ours do not affect the peer."""

from __future__ import annotations

import shutil
from pathlib import Path

from vfu_dev.builds.cache import tree_digest
from vfu_dev.builds.command import BuildContext
from vfu_dev.builds.compiler import compiler_version
from vfu_dev.builds.libvfio_user import PRODUCT, RELEASE
from vfu_dev.builds.libvfio_user_tree import TARGET, compile_tree
from vfu_dev.builds.native import native_dir
from vfu_dev.builds.patch_series import read_series, series_inputs
from vfu_dev.builds.pinned import SHA256
from vfu_dev.builds.recipe import Facts, Recipe

# Raised when this module builds something different from the same inputs.
_VERSION = 1

_FOLDER = "bench"
_CLIENT = "vfu-bench-client"
_PEER = "samples/vfu-ref-server"
_C_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")


def _client_files() -> dict[str, str]:
    """Return name -> digest of the client's sources; the folder also has the peer's patch."""
    digests = tree_digest(native_dir() / _FOLDER)
    return {name: digest for name, digest in digests.items() if name.endswith((".c", ".h"))}


def _client_inputs() -> Facts:
    return {
        "recipe": _VERSION,
        "files": _client_files(),
        "flags": _C_FLAGS,
        "compiler": compiler_version(),
    }


def _make_client(context: BuildContext, out: Path) -> Facts:
    sources = [native_dir() / _FOLDER / name for name in sorted(_client_files()) if name.endswith(".c")]
    context.run(["cc", *_C_FLAGS, "-o", out / _CLIENT, *sources], title="bench-client: compile", cwd=out)
    return {"flags": _C_FLAGS, "compiler": compiler_version()}


def _peer_inputs() -> Facts:
    return {
        "recipe": _VERSION,
        "sources": SHA256,
        "patches": series_inputs(read_series(native_dir() / _FOLDER)),
        "options": RELEASE,
        "compiler": compiler_version(),
    }


def _make_peer(context: BuildContext, out: Path) -> Facts:
    """Build server and library; meson gave the server a run path, ../lib from its folder."""
    work = out / "work"
    work.mkdir()
    build = compile_tree(context, work, RELEASE, (), "bench-peer", _PEER, folder=_FOLDER)
    for name in (_PEER, TARGET):
        (out / name).parent.mkdir()
        shutil.copy(build / name, out / name)
    (out / TARGET).rename((out / TARGET).with_name(PRODUCT))
    shutil.rmtree(work)
    return {"options": RELEASE, "compiler": compiler_version()}


CLIENT = Recipe(
    name="bench-client",
    summary="the client that `vfu-dev bench` times requests with",
    product=_CLIENT,
    inputs=_client_inputs,
    make=_make_client,
    needs=("c",),
)
PEER = Recipe(
    name="bench-peer",
    summary="a device in C on a library of November 2026, which `vfu-dev bench` compares with",
    product=_PEER,
    inputs=_peer_inputs,
    make=_make_peer,
    needs=("libvfio-user",),
)
