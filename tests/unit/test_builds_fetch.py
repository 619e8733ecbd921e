"""The pinned sources: from a mirror (a real one, on disk), from a folder, or one clear error."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
from pathlib import Path

import pytest

from vfu_dev.builds import apt, fetch
from vfu_dev.builds.cache import file_digest
from vfu_dev.builds.command import BuildContext
from vfu_dev.builds.fetch import SourceError

VERSION = "1:10.2.2+ds-1"
PROGRAMS = ("apt-get", "dpkg-source", "dpkg-scansources")
needs_apt = pytest.mark.skipif(
    not all(map(shutil.which, PROGRAMS)), reason=f"needs {', '.join(PROGRAMS)} (apt, dpkg-dev)"
)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny source package under the pinned name and version, made by dpkg-source."""
    folder = tmp_path_factory.mktemp("package")
    tree = folder / "qemu-10.2.2+ds"
    (tree / "debian" / "source").mkdir(parents=True)
    (tree / "README").write_text("a tiny qemu\n")
    subprocess.run(
        ["tar", "-cJf", "qemu_10.2.2+ds.orig.tar.xz", f"--exclude={tree.name}/debian", tree.name],
        cwd=folder,
        check=True,
    )
    (tree / "debian" / "source" / "format").write_text("3.0 (quilt)\n")
    (tree / "debian" / "control").write_text(
        "Source: qemu\nMaintainer: A <a@example.org>\n\nPackage: qemu\nArchitecture: any\nDescription: tiny\n"
    )
    (tree / "debian" / "changelog").write_text(
        f"qemu ({VERSION}) sid; urgency=low\n\n  * Tiny.\n\n"
        " -- A <a@example.org>  Thu, 01 Jan 2026 00:00:00 +0000\n"
    )
    (tree / "debian" / "patches").mkdir()
    (tree / "debian" / "patches" / "series").write_text("more\n")
    (tree / "debian" / "patches" / "more").write_text(
        "--- a/README\n+++ b/README\n@@ -1 +1 @@\n-a tiny qemu\n+a tiny patched qemu\n"
    )
    subprocess.run(["dpkg-source", "-b", tree.name], cwd=folder, check=True, capture_output=True)
    shutil.rmtree(tree)
    return folder


@pytest.fixture
def mirror(package: Path, tmp_path: Path) -> Path:
    """A mirror of sid, on disk, with that one package and without a signature."""
    root = tmp_path / "mirror"
    pool = root / "pool"
    shutil.copytree(package, pool)
    index = root / "dists" / "sid" / "main" / "source" / "Sources"
    index.parent.mkdir(parents=True)
    scan = subprocess.run(["dpkg-scansources", "pool"], cwd=root, check=True, capture_output=True)
    index.write_bytes(scan.stdout)
    digest = hashlib.sha256(scan.stdout).hexdigest()
    (root / "dists" / "sid" / "Release").write_text(
        "Suite: sid\nCodename: sid\nComponents: main\nArchitectures: amd64\n"
        f"Date: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n {digest} {len(scan.stdout)} main/source/Sources\n"
    )
    return root


@pytest.fixture
def _pinned(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pin the tiny package in place of QEMU."""
    monkeypatch.setattr(fetch, "SHA256", {name: file_digest(package / name) for name in fetch.SHA256})


def use_mirrors(monkeypatch: pytest.MonkeyPatch, *mirrors: str) -> None:
    monkeypatch.setattr(apt, "mirrors", lambda context: list(mirrors))


@needs_apt
@pytest.mark.usefixtures("_pinned")
def test_sources_come_from_the_first_mirror_that_has_them_and_unpack_patched(
    context: BuildContext, mirror: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: io.StringIO
) -> None:
    use_mirrors(monkeypatch, f"file:{tmp_path}/absent", f"file:{mirror}")
    tree = fetch.unpacked(context)
    assert (tree / "README").read_text() == "a tiny patched qemu\n"
    assert f"from file:{mirror}, sums verified" in out.getvalue()
    assert "no key for sid" in out.getvalue(), "an unsigned list was used without a word"

    shutil.rmtree(mirror)  # what is in the cache needs no mirror
    shutil.rmtree(tree)
    assert fetch.unpacked(context) == tree


@needs_apt
@pytest.mark.usefixtures("_pinned")
def test_a_mirror_that_dropped_the_version_is_one_clear_error(
    context: BuildContext, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_mirrors(monkeypatch, f"file:{mirror}")
    monkeypatch.setattr(fetch, "VERSION", "1:9.9-1")
    with pytest.raises(SourceError) as caught:
        fetch.obtain(context)
    text = str(caught.value)
    assert "no longer has version 1:9.9-1 of qemu in sid" in text
    assert "--sources DIR" in text
    assert all(name in text for name in fetch.SHA256)
    assert not list((context.cache.root / "sources").iterdir())


@needs_apt
def test_files_from_a_mirror_whose_sums_differ_are_not_used(
    context: BuildContext, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_mirrors(monkeypatch, f"file:{mirror}")
    with pytest.raises(
        SourceError, match=r"is not the pinned file: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"
    ):
        fetch.obtain(context)
    assert not list((context.cache.root / "sources").iterdir())


@needs_apt
@pytest.mark.usefixtures("_pinned")
def test_the_fallback_folder_is_used_only_after_the_mirror_failed_and_is_announced(
    context: BuildContext, mirror: Path, package: Path, monkeypatch: pytest.MonkeyPatch, out: io.StringIO
) -> None:
    context.sources_fallback = package
    use_mirrors(monkeypatch, f"file:{mirror}")
    fetch.obtain(context)
    assert "falling back" not in out.getvalue()

    shutil.rmtree(context.cache.root / "sources")
    shutil.rmtree(mirror)
    folder = fetch.obtain(context)
    assert f"falling back to {package}" in out.getvalue()
    fetch.check(folder, "the cache")


@pytest.mark.usefixtures("_pinned")
@needs_apt
def test_a_folder_needs_no_network(
    context: BuildContext, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_mirrors(context: BuildContext) -> list[str]:
        raise AssertionError("a mirror was asked for although a folder was given")

    monkeypatch.setattr(apt, "mirrors", no_mirrors)
    context.sources = package
    fetch.check(fetch.obtain(context), "the cache")


def test_a_folder_with_a_missing_or_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"lacks .*qemu_10\.2\.2\+ds-1\.dsc"):
        fetch.check(tmp_path, "the folder")
    for name in fetch.SHA256:
        (tmp_path / name).write_text("damaged")
    with pytest.raises(SourceError, match=r"from the folder is not the pinned file"):
        fetch.check(tmp_path, "the folder")


def test_a_folder_named_by_the_environment_has_to_exist(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("VFU_DEV_SOURCES", raising=False)
    assert fetch.folder_from_environment("VFU_DEV_SOURCES") is None
    monkeypatch.setenv("VFU_DEV_SOURCES", str(tmp_path))
    assert fetch.folder_from_environment("VFU_DEV_SOURCES") == tmp_path
    for missing in ("~nobody-has-this-name/sources", str(tmp_path / "absent")):
        monkeypatch.setenv("VFU_DEV_SOURCES", missing)
        with pytest.raises(SourceError, match="no such folder"):
            fetch.folder_from_environment("VFU_DEV_SOURCES")
