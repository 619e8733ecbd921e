"""The fuzz targets: our C under libFuzzer with the address and undefined behaviour sanitizers.

native/fuzz/ has the targets. libvfio-user and the preloaded library are compiled into them, from the same
sources as the libraries. Beside each is TARGET-planted, with a known fault for it to find: docs/fuzzing.md.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from vfu_dev.builds import fetch, patches
from vfu_dev.builds.cache import tree_digest
from vfu_dev.builds.command import BuildContext, build_environment, output_of
from vfu_dev.builds.libvfio_user_tree import patched_source
from vfu_dev.builds.native import native_dir
from vfu_dev.builds.patch_series import read_series, series_inputs
from vfu_dev.builds.pinned import SHA256
from vfu_dev.builds.recipe import Facts, Recipe

# Raised when this module builds something different from the same inputs.
_VERSION = 1

_FOLDER = "fuzz"
PLANTED = "-planted"
_SANITIZERS = "-fsanitize=address,undefined"
_C_FLAGS = (
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-O1",
    "-gline-tables-only",
    "-fno-omit-frame-pointer",
    "-fsanitize=fuzzer-no-link,address,undefined",
    "-fno-sanitize-recover=undefined",
    # Structures of <linux/vfio.h> and of vfio-user end in flexible arrays, and are members of others.
    "-Wno-gnu-variable-sized-type-not-at-end",
)
_STRICT = ("-Wall", "-Wextra", "-Werror")
# Waiting and time are the target's: see native/fuzz/libvfio-user/peer.c.
_LIBRARY = ("-Dpoll=fuzz_poll", "-Dclock_gettime=fuzz_clock_gettime", "-Wno-pointer-arith")
# The server is in the same process, and no symbol is interposed: native/fuzz/vfio-preload/program.c.
_PRELOAD = ("-Dconnect=fuzz_connect", "-Dclose=fuzz_close", "-Wno-macro-redefined")
# What the targets have instead.
_NOT_LINKED = frozenset(
    {"calls.c", "config.c", "descriptors.c", "interpose.c", "log.c", "open.c", "symbols.c"}
)

# Name -> its own file below native/fuzz/, and whether its input consists of records (mutate.c).
_TARGETS = {
    "server": ("libvfio-user/server.c", True),
    "migration": ("libvfio-user/migration.c", False),
    "dma-log": ("libvfio-user/dma_log.c", False),
    "preload": ("vfio-preload/program.c", True),
}


def _clang_version() -> str:
    return output_of(["clang", "--version"]).partition("\n")[0] or "none"


def _inputs() -> Facts:
    native = native_dir()
    return {
        "recipe": _VERSION,
        "sources": SHA256,
        "patches": series_inputs(read_series(native / "libvfio-user")),
        "files": {
            folder: {name: found for name, found in tree_digest(native / folder).items() if _is_source(name)}
            for folder in ("libvfio-user/src", "vfio-preload", _FOLDER)
        },
        "flags": [*_C_FLAGS, *_LIBRARY, *_PRELOAD],
        "compiler": _clang_version(),
    }


def _is_source(name: str) -> bool:
    return name.endswith((".c", ".h", ".patch"))


class _Ninja:
    """The text of a build.ninja: objects, and the programs that are linked of them."""

    def __init__(self) -> None:
        self.lines = [
            "rule cc",
            "  command = clang $flags -c -o $out $in",
            "rule link",
            f"  command = clang -fsanitize=fuzzer {_SANITIZERS} -o $out $in $libraries",
        ]

    def objects(self, folder: str, sources: list[Path], *flags: str) -> list[str]:
        """Compile `sources`; return the names of the objects."""
        names = []
        for source in sources:
            names.append(f"objects/{folder}/{source.stem}.o")
            self.lines += [f"build {names[-1]}: cc {source}", f"  flags = {' '.join([*_C_FLAGS, *flags])}"]
        return names

    def program(self, name: str, objects: list[str], *libraries: str) -> None:
        """Link a target."""
        self.lines += [f"build {name}: link {' '.join(objects)}", f"  libraries = {' '.join(libraries)}"]


def _describe(work: Path, headers: Path) -> str:
    """Return the build.ninja for the sources in `work`."""
    library, preload, fuzz = work / "source", work / "vfio-preload", work / _FOLDER
    system = f"-isystem {headers}"
    json_c = output_of(["pkg-config", "--cflags", "json-c"]).split()
    ninja = _Ninja()
    check, records, mutate = (
        ninja.objects("common", [fuzz / f"{name}.c"], *_STRICT)[0] for name in ("check", "records", "mutate")
    )
    flags = {
        "libvfio-user": [*_LIBRARY, f"-I{library}/include", f"-I{library}/lib", *json_c, system],
        "vfio-preload": [*_PRELOAD, f"-I{preload}", system],
    }
    own_flags = {
        "libvfio-user": [*_STRICT, f"-I{fuzz}", f"-I{library}/include", f"-I{library}/lib", system],
        "vfio-preload": [*_STRICT, f"-I{fuzz}", f"-I{preload}", system],
    }
    sources = {
        "libvfio-user": sorted(set((library / "lib").glob("*.c")) - {library / "lib" / "tran_pipe.c"}),
        "vfio-preload": sorted(one for one in preload.glob("*.c") if one.name not in _NOT_LINKED),
    }
    under_test = {name: ninja.objects(name, files, *flags[name]) for name, files in sources.items()}
    around = {
        name: ninja.objects(f"{name}-around", [fuzz / name / one for one in files], *own_flags[name])
        for name, files in {
            "libvfio-user": ["device.c", "states.c", "peer.c", "messages.c"],
            "vfio-preload": ["server.c", "honest.c", "guest.c", "instead.c"],
        }.items()
    }
    for name, (path, has_records) in _TARGETS.items():
        what = path.partition("/")[0]
        own = ninja.objects(f"target-{name}", [fuzz / path], *own_flags[what])
        own += [check, records, *([mutate] if has_records else []), *around[what]]
        libraries = ["-lpthread"] if what == "vfio-preload" else ["-ljson-c"]
        ninja.program(name, own + under_test[what], *libraries)
        faulty = sorted((work / "planted" / name).rglob("*.c"))
        planted = ninja.objects(f"planted-{name}", faulty, *flags[what])
        stems = {one.stem for one in faulty}
        sound = [one for one in under_test[what] if Path(one).stem not in stems]
        ninja.program(f"{name}{PLANTED}", own + sound + planted, *libraries)
    return "\n".join(ninja.lines) + "\n"


def _plant(context: BuildContext, work: Path, title: str) -> None:
    """Put the files that have each target's fault into `work`/planted/TARGET."""
    trees = {"libvfio-user": work / "source", "vfio-preload": work / "vfio-preload"}
    for name, (path, _) in _TARGETS.items():
        what = path.partition("/")[0]
        folder = work / _FOLDER / "planted" / name
        for patch in (series := read_series(folder)):
            for touched in patch.touches:
                (work / "planted" / name / touched).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(trees[what] / touched, work / "planted" / name / touched)
        patches.apply_series(context, series, work / "planted" / name, title)


def _make(context: BuildContext, out: Path) -> Facts:
    title = out.name.rpartition("-")[0]
    work = out / "work"
    work.mkdir()
    native = native_dir()
    library = patched_source(context, work, title)
    for folder in ("vfio-preload", _FOLDER):
        shutil.copytree(native / folder, work / folder)
    patches.apply_series(context, read_series(work / _FOLDER / "libvfio-user"), library, title)
    _plant(context, work, title)
    headers = fetch.unpacked(context) / "linux-headers"
    (work / "build.ninja").write_text(_describe(work, headers))
    context.run(
        ["ninja", f"-j{context.jobs}", "-C", work],
        title=f"{title}: compile",
        cwd=work,
        env=build_environment(),
    )
    for name in _TARGETS:
        shutil.move(work / name, out / name)
        shutil.move(work / f"{name}{PLANTED}", out / f"{name}{PLANTED}")
    shutil.rmtree(work)
    return {"flags": _C_FLAGS, "compiler": _clang_version(), "targets": list(_TARGETS)}


TARGETS = Recipe(
    name="fuzz-targets",
    summary="libvfio-user and vfio-preload under libFuzzer, with sanitizers",
    product="",
    inputs=_inputs,
    make=_make,
    needs=("libvfio-user", "fuzz"),
)
