"""Debian's QEMUs: from a signed mirror (on disk) or a folder with sums; whole, or one clear error."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import debkit
import pytest

from vfu_dev.builds import apt, qemu_packages
from vfu_dev.builds.cache import Cache, file_digest
from vfu_dev.builds.making import BuildOptions, Built, build, damage
from vfu_dev.builds.progress import Reporter
from vfu_dev.builds.recipe import read_manifest
from vfu_dev.errors import BuildError

PROGRAMS = ("apt-get", "cc", "dpkg-deb", "dpkg-scanpackages", "gpg")
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, PROGRAMS)), reason=f"needs {', '.join(PROGRAMS)} (apt, gcc, dpkg-dev, gpg)"
)
SUITE = qemu_packages.SUITES[0]
RECIPE = qemu_packages.BACKPORTS[0]
NEEDED = ["libc6", "libtiny1", "qemu-system-common", "qemu-system-data", "qemu-system-x86", "seabios"]


@pytest.fixture(scope="module")
def debs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all packages of the made-up Debian."""
    folder = tmp_path_factory.mktemp("debs")
    debkit.build_debs(debkit.packages(folder / "compiled"), folder / "all")
    return folder / "all"


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> debkit.Signer:
    return debkit.Signer(tmp_path_factory.mktemp("gpg") / "home")


@pytest.fixture
def mirror(debs: Path, signer: debkit.Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror of the suite and its release, signed, in place of those that this machine uses."""
    root, nothing = tmp_path / "mirror", tmp_path / "nothing"
    nothing.mkdir()
    debkit.publish(root, nothing, SUITE.release, signer)
    debkit.publish(root, debs, SUITE.name, signer)
    use(monkeypatch, signer.keyring, f"file:{root}")
    return root


@pytest.fixture
def folder(debs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for VFU_DEV_PACKAGES that has what is needed, and its sums; no mirror may be asked."""
    place = tmp_path / "packages"
    (place / SUITE.release).mkdir(parents=True)
    for path in debs.glob("*.deb"):
        if path.name.partition("_")[0] in NEEDED:
            shutil.copy(path, place / SUITE.release)
    write_sums(place)
    monkeypatch.setenv("VFU_DEV_PACKAGES", str(place))

    def no_mirrors(context: object) -> list[str]:
        raise AssertionError("a mirror was asked for although a folder was given")

    monkeypatch.setattr(apt, "mirrors", no_mirrors)
    return place


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def use(monkeypatch: pytest.MonkeyPatch, keyring: Path, *mirrors: str) -> None:
    monkeypatch.delenv("VFU_DEV_PACKAGES", raising=False)
    monkeypatch.setattr(apt, "mirrors", lambda context: list(mirrors))
    monkeypatch.setattr(apt, "_KEYRING", keyring)


def write_sums(folder: Path) -> None:
    found = sorted((folder / SUITE.release).glob("*.deb"))
    lines = [f"{file_digest(path)}  {SUITE.release}/{path.name}\n" for path in found]
    (folder / "SHA256SUMS").write_text("".join(lines))


def package(folder: Path, name: str) -> Path:
    return next((folder / SUITE.release).glob(f"{name}_*.deb"))


def make(cache: Cache, out: io.StringIO, again: bool = False) -> Built:
    return build(RECIPE, cache, BuildOptions(), Reporter(out), again=again)


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        command, env=os.environ | environment, cwd=cwd, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def taken(folder: Path) -> list[str]:
    facts = read_manifest(folder)["facts"]
    assert isinstance(facts, dict)
    return [name.partition("_")[0] for name in facts["packages"]]


def test_from_a_mirror_comes_what_the_program_needs_and_no_more(
    mirror: Path, cache: Cache, out: io.StringIO
) -> None:
    """apt resolves it; libraries for displays and sound, and what only installing needs, stay away."""
    built = make(cache, out)
    assert run(built.path, "--version") == "QEMU emulator version 10.0.2 (Tiny)\n"
    root = built.path.parent
    assert taken(root) == NEEDED
    assert f"from file:{mirror}, {len(NEEDED)} packages" in out.getvalue()
    assert "was tested with" not in out.getvalue()
    assert (root / "usr/share/seabios/bios-256k.bin").read_bytes() == b"bios"
    assert not (root / "usr/share/doc").exists()
    modules = [path.name for path in (root / debkit.LIBRARIES / "qemu").iterdir()]
    assert modules == ["accel-qtest.so"], "a module whose library is missing could only fail"
    assert not list(root.rglob("*.deb"))
    assert not make(cache, out).built


def test_the_script_hands_on_arguments_and_environment(
    mirror: Path, cache: Cache, out: io.StringIO, tmp_path: Path
) -> None:
    """A preloaded library works, and what QEMU starts runs with this machine's loader and libraries."""
    program = make(cache, out).path
    preload = debkit.compile_c(
        tmp_path / "preload.so",
        "#include <stdio.h>\n"
        '__attribute__((constructor)) static void hello(void) { fprintf(stderr, "preloaded\\n"); }',
        *("-shared", "-fPIC"),
    )
    said = run(program, "-name", "a b", "", LD_PRELOAD=str(preload)).splitlines()
    root = program.parent
    firmware = [f"{root}/usr/share/qemu", f"{root}/usr/share/seabios"]
    arguments = [line.removeprefix("arg ") for line in said if line.startswith("arg ")]
    assert arguments == [str(program), "-name", "a b", "", "-L", firmware[0], "-L", firmware[1]]
    assert f"LD_PRELOAD={preload}" in said
    assert "LD_LIBRARY_PATH=" in said, "children would inherit libraries that are not theirs"
    assert f"QEMU_MODULE_DIR={root}/{debkit.LIBRARIES}/qemu" in said
    assert "child runs" in said
    assert said.count("preloaded") >= 3, "the script's shell, the program, its child"


def test_the_script_works_by_any_name(mirror: Path, cache: Cache, out: io.StringIO, tmp_path: Path) -> None:
    """A link, a relative path, the PATH."""
    program = make(cache, out).path
    link = tmp_path / "my-qemu"
    link.symlink_to(program)
    expected = "QEMU emulator version 10.0.2 (Tiny)\n"
    assert run(link, "--version") == expected
    assert run(f"./{program.name}", "--version", cwd=program.parent) == expected
    assert run("sh", program.name, "--version", cwd=program.parent) == expected
    path = f"{program.parent}:{os.environ['PATH']}"
    assert run("sh", "-c", f"{program.name} --version", PATH=path) == expected


def test_a_version_newer_than_the_known_one_is_used_and_said(
    mirror: Path, cache: Cache, out: io.StringIO
) -> None:
    older = replace(SUITE, known=(9, 2))
    build(qemu_packages._recipe(older), cache, BuildOptions(), Reporter(out))
    assert f"{SUITE.name} has QEMU 10.0.2 (Tiny) now; vfu-dev was tested with 9.2" in out.getvalue()


@pytest.mark.parametrize("signed", ["unsigned", "by another"])
def test_a_list_that_nobody_trusted_signed_is_not_used(
    signed: str,
    debs: Path,
    signer: debkit.Signer,
    cache: Cache,
    out: io.StringIO,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No sum is pinned for these packages: the signature is all there is."""
    other = None if signed == "unsigned" else debkit.Signer(tmp_path / "other")
    for suite in (SUITE.release, SUITE.name):
        debkit.publish(tmp_path / "mirror", debs, suite, other)
    use(monkeypatch, signer.keyring, f"file:{tmp_path}/mirror")
    with pytest.raises(BuildError, match=r"file:.*/mirror: The repository .* is not signed"):
        make(cache, out)
    assert not (cache.root / "artifacts").exists()


def test_a_package_that_was_changed_in_the_mirror_is_not_used(
    mirror: Path, cache: Cache, out: io.StringIO
) -> None:
    changed = next((mirror / "pool").rglob("libtiny1_*.deb"))
    changed.write_bytes(changed.read_bytes()[:-1] + b"!")
    with pytest.raises(BuildError, match="cannot be had"):
        make(cache, out)


def test_mirrors_are_asked_in_turn_and_the_error_has_what_each_said(
    mirror: Path, cache: Cache, out: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrors = [f"file:{tmp_path}/absent", f"file:{mirror}"]
    monkeypatch.setattr(apt, "mirrors", lambda context: mirrors)
    assert make(cache, out).built
    mirrors.pop()
    with pytest.raises(BuildError) as caught:
        make(cache, out, again=True)
    text = str(caught.value)
    assert f"file:{tmp_path}/absent: " in text
    assert f"VFU_DEV_PACKAGES=DIR, with DIR/{SUITE.release}/*.deb and DIR/SHA256SUMS" in text
    assert not make(cache, out).built, "a failed attempt to replace an artifact took it away"


def test_again_takes_what_the_mirror_has_now(
    mirror: Path, cache: Cache, out: io.StringIO, signer: debkit.Signer, debs: Path, tmp_path: Path
) -> None:
    first = make(cache, out)
    shutil.rmtree(mirror / "dists" / SUITE.name)
    shutil.rmtree(mirror / "pool" / SUITE.name)
    newer = tmp_path / "newer"
    shutil.copytree(debs, newer)
    shutil.rmtree(newer / "x", ignore_errors=True)
    old = next(newer.glob("seabios_*.deb"))
    old.unlink()
    bios = debkit.Deb("seabios", "otherosfs", "", {"usr/share/seabios/bios-256k.bin": b"newer"}, "all")
    debkit.build_debs([bios], tmp_path / "one")
    shutil.copy(next((tmp_path / "one").glob("*.deb")), newer)
    debkit.publish(mirror, newer, SUITE.name, signer)
    assert not make(cache, out).built
    assert make(cache, out, again=True).path == first.path
    assert (first.path.parent / "usr/share/seabios/bios-256k.bin").read_bytes() == b"newer"
    assert not list((cache.root / "tmp").iterdir())


def test_a_folder_needs_no_network(folder: Path, cache: Cache, out: io.StringIO) -> None:
    built = make(cache, out)
    assert run(built.path, "--version").startswith("QEMU emulator version 10.0.2")
    assert taken(built.path.parent) == NEEDED
    key = RECIPE.key()
    with (folder / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  another-release/x.deb\n")
    assert RECIPE.key() == key, "packages of another suite count"


def test_a_folder_whose_packages_are_not_what_its_sums_say_is_refused_by_name(
    folder: Path, cache: Cache, out: io.StringIO
) -> None:
    """Missing, damaged, without a sum, and no sums at all."""
    seabios, tiny = package(folder, "seabios"), package(folder, "libtiny1")
    content = seabios.read_bytes()
    seabios.unlink()
    with pytest.raises(BuildError, match=re.escape(f"lacks {seabios.name}")):
        make(cache, out)
    seabios.write_bytes(content[:-1] + b"!")
    with pytest.raises(BuildError, match=r"seabios_.*: sha256 [0-9a-f]{64}, expected [0-9a-f]{64} by"):
        make(cache, out)
    seabios.write_bytes(content)
    shutil.copy(tiny, tiny.with_name("extra_1_all.deb"))
    with pytest.raises(BuildError, match=rf"has no sum of {SUITE.release}/extra_1_all\.deb"):
        make(cache, out)
    (folder / "SHA256SUMS").write_text("")
    with pytest.raises(BuildError, match=rf"names no {SUITE.release}/\*\.deb"):
        make(cache, out)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(BuildError, match="no SHA256SUMS that can be read"):
        make(cache, out)
    assert not (cache.root / "artifacts").exists()


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("libtiny1", r"libtiny\.so\.1 \(needed by qemu-system-x86_64\)"),
        ("libc6", r"libc\.so\.6 \(needed by libtiny\.so\.1|libc\.so\.6 \(needed by qemu-system-x86_64\)"),
        ("seabios", r"no bios-256k\.bin in the packages there"),
        ("qemu-system-x86", r"no qemu-system-x86_64 in the packages there"),
    ],
)
def test_a_folder_that_lacks_a_package_names_what_is_missing(
    folder: Path, cache: Cache, out: io.StringIO, absent: str, message: str
) -> None:
    """Found by what the program's headers ask for, although this machine may have it."""
    package(folder, absent).unlink()
    write_sums(folder)
    with pytest.raises(BuildError, match=message):
        make(cache, out)
    assert not (cache.root / "artifacts").exists()


def test_a_byte_that_flips_in_the_cache_is_found_and_building_again_mends_it(
    folder: Path, cache: Cache, out: io.StringIO
) -> None:
    root = make(cache, out).path.parent
    assert damage(root) == []
    library = root / debkit.LIBRARIES / "libtiny.so.1"
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 1
    library.write_bytes(data)
    (root / "usr/share/seabios/bios-256k.bin").unlink()
    name = f"{debkit.LIBRARIES}/libtiny.so.1"
    assert damage(root) == ["usr/share/seabios/bios-256k.bin is gone", f"{name} differs from what was built"]
    make(cache, out, again=True)
    assert damage(root) == []
    (root / "manifest.json").write_text(json.dumps({}))
    assert damage(root) == ["no manifest.json that lists what should be there"]
