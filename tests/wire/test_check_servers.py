"""`vfu-dev check` against real servers: ours, the one in C, and QEMU's own, which shares no code with either.

What fails is known by name, and is what docs/conformance.md says.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conformance_page import PAGE, WORDS, columns
from serverkit import PATIENCE_SECONDS, ServerFactory

from vfu_dev.builds import Cache, artifact, native_dir
from vfu_dev.builds.command import BuildContext
from vfu_dev.builds.fetch import unpacked
from vfu_dev.builds.progress import Reporter
from vfu_dev.conformance import CHECKS, Result, Status, choose, model, run, runner
from vfu_dev.errors import VfuDevError

# docs/conformance.md says why each of these fails.
OURS: set[str] = set()
REFERENCE = {"version-offers-what-was-proposed"}  # its libvfio-user is from before native/libvfio-user/0031
QEMU = {
    "dma-map-twice-is-refused",
    "dma-map-over-another-is-refused",
    "dma-maps-are-as-many-as-said",
    "version-offers-what-was-proposed",
    "version-refuses-another-major",
}


def checked(path: Path, column: str, *command: str | Path) -> tuple[list[Result], set[str]]:
    """Return all results, which are those of the page, and the musts that failed."""
    words = [str(word) for word in command]
    results = list(run(path, choose([], []), command=words, timeout_seconds=PATIENCE_SECONDS))
    assert len(results) == len(CHECKS)
    found = {result.check.name: WORDS[result.status.value] for result in results}
    assert found == columns(PAGE.read_text())[column]
    return results, {result.check.name for result in results if result.broken}


@pytest.mark.usefixtures("patience_with_second_clients")
def test_our_server(serve: ServerFactory) -> None:
    """And it is in use afterwards: what was checked left nothing behind."""
    server = serve("--fill", "7", "--access", "mmap", memory="1000K")
    results, failed = checked(server.socket, "vfu-dev serve")
    assert failed == OURS
    assert sum(result.status is Status.PASS for result in results) > 150
    with server.connect() as device:
        assert device.region_read(2, 0, 4096)
        assert device.migration.get_state().name == "RUNNING"


def test_the_server_in_c(short_tmp: Path) -> None:
    reference = artifact("bench-peer", build=True)
    path = short_tmp / "reference"
    _, failed = checked(path, "reference in C", reference, path, "1", "7")
    assert failed == REFERENCE


def test_qemus_server(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no migration, ends with its client, and is started again for the next."""
    try:
        qemu = artifact("qemu-unpatched")
    except VfuDevError as error:
        pytest.skip(str(error))
    # A busy machine takes more than a moment to end a QEMU, and the next one may not be started before.
    monkeypatch.setattr(runner, "_LEAVING_SECONDS", 10.0)
    path = short_tmp / "qemu"
    machine = ["-machine", "x-remote,vfio-user=on", "-nodefaults", "-display", "none"]
    device = ["-device", "e1000e,id=nic,romfile="]
    server = ["-object", f"x-vfio-user-server,id=vfu,type=unix,path={path},device=nic"]
    results, failed = checked(path, "QEMU 10.2.2, e1000e", qemu, *machine, *device, *server)
    assert failed == QEMU
    assert {one.status for one in results if one.check.group in ("states", "stream")} == {Status.SKIP}


def plain(text: str) -> str:
    """Return `text` without the frames of tables, the stars of comments and the breaks of lines."""
    return " ".join(re.sub(r"^ ?\*(?= |$)|[|]", " ", text, flags=re.MULTILINE).split())


def test_sentences_are_quoted_as_they_stand(tmp_path: Path) -> None:
    """Each check's sentence is in the document that it names, word by word, where that one is at hand."""
    tree = unpacked(BuildContext(Cache(), Reporter(), tmp_path / "log", jobs=1))
    documents = {
        model.SPECIFICATION: tree / "docs" / "interop" / "vfio-user.rst",
        model.KERNEL: tree / "linux-headers" / "linux" / "vfio.h",
        model.ADDITIONS: native_dir() / "spec" / "vfio-user-migration.rst",
    }
    texts = {name: plain(path.read_text()) for name, path in documents.items()}
    elsewhere = {model.NEWER_SPECIFICATION, model.PCI}
    wrong = [
        (check.name, check.source.quote)
        for check in CHECKS.values()
        if check.source.document not in elsewhere
        and plain(check.source.quote) not in texts[check.source.document]
    ]
    assert wrong == []
    assert sum(check.source.document in elsewhere for check in CHECKS.values()) < 10
