"""The pinned source package: downloads, checks and unpacks it.

QEMU and libvfio-user both come out of one Debian source package. The three files come from this machine's
mirror or from a folder. In both cases they are used only if their sha256 sums match.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from vfu_dev.builds import apt
from vfu_dev.builds.cache import file_digest, input_key, path_meant, remove_tree
from vfu_dev.builds.command import BuildContext, CommandError
from vfu_dev.builds.pinned import DSC, PACKAGE, SHA256, SUITE, VERSION
from vfu_dev.errors import BuildError

SOURCES_ENVIRONMENT = "VFU_DEV_SOURCES"
FALLBACK_ENVIRONMENT = "VFU_DEV_SOURCES_FALLBACK"

_KEY = input_key({"sha256": SHA256})


class SourceError(BuildError):
    """The pinned sources are not available, or their sums differ."""


def check(folder: Path, where: str) -> None:
    """Compare the three files in `folder` with the pinned sums.

    Raises: SourceError: one is missing, or its sum differs; names the file, both sums and `where` it came
            from.
    """
    missing = [name for name in SHA256 if not (folder / name).is_file()]
    if missing:
        raise SourceError(f"{where} lacks {', '.join(missing)}")
    for name, expected in SHA256.items():
        found = file_digest(folder / name)
        if found != expected:
            raise SourceError(
                f"{name} from {where} is not the pinned file: sha256 {found}, expected {expected}"
            )


def obtain(context: BuildContext) -> Path:
    """Return the folder in the cache with the three verified files, fetching them first where needed.

    Raises: SourceError: no place has them; says what each place answered and what to do.
    """
    folder = context.cache.root / "sources" / _KEY
    if all((folder / name).is_file() for name in SHA256):
        return folder
    with context.cache.lock(f"sources-{_KEY}", context.reporter_waiting("the sources")):
        if all((folder / name).is_file() for name in SHA256):
            return folder
        temporary = folder.with_suffix(".partial")
        remove_tree(temporary)
        temporary.mkdir(parents=True)
        try:
            _fill(context, temporary)
            temporary.rename(folder)
        finally:
            remove_tree(temporary)
    return folder


def unpacked(context: BuildContext) -> Path:
    """Return the source tree with Debian's patches, unpacking it first if needed.

    The tree is shared: callers must not write to it.
    """
    tree = context.cache.root / "trees" / f"qemu-{_KEY}"
    if tree.is_dir():
        return tree
    with context.cache.lock(f"tree-{_KEY}", context.reporter_waiting("the source tree")) as fd:
        if tree.is_dir():
            return tree
        folder = obtain(context)
        check(folder, str(folder))
        temporary = tree.with_suffix(".partial")
        remove_tree(temporary)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        context.fds.append(fd)
        try:
            context.run(
                ["dpkg-source", "-x", folder / DSC, temporary],
                title="unpack the sources",
                cwd=temporary.parent,
            )
        finally:
            context.fds.remove(fd)
        temporary.rename(tree)
    return tree


def _fill(context: BuildContext, into: Path) -> None:
    """Put the verified files into `into`, from the given folder, a mirror, or the fallback folder."""
    if context.sources is not None:
        _copy(context.sources, into)
        context.reporter.say(f"sources: {PACKAGE} {VERSION} from {context.sources}, sums verified")
        return
    try:
        mirror = _download(context, into)
    except SourceError as error:
        if context.sources_fallback is None:
            raise SourceError(
                f"{error}\n  A folder that holds {', '.join(SHA256)} works instead: "
                f"vfu-dev build --sources DIR (or {SOURCES_ENVIRONMENT}=DIR)"
            ) from error
        context.reporter.say(f"{error}\nsources: falling back to {context.sources_fallback}")
        _copy(context.sources_fallback, into)
        context.reporter.say(f"sources: {PACKAGE} {VERSION} from {context.sources_fallback}, sums verified")
    else:
        context.reporter.say(f"sources: {PACKAGE} {VERSION} from {mirror}, sums verified")


def _copy(folder: Path, into: Path, where: str = "") -> None:
    check(folder, where or str(folder))
    for name in SHA256:
        shutil.copyfile(folder / name, into / name)


def _download(context: BuildContext, into: Path) -> str:
    """Download from the first of this machine's mirrors that has the version; return that mirror."""
    if not apt.available():
        raise SourceError(f"no apt on this machine to fetch {PACKAGE} {VERSION} with")
    try:
        candidates = apt.mirrors(context)
    except BuildError as error:
        raise SourceError(str(error)) from error
    reasons: list[str] = []
    for mirror in candidates:
        private_folder, downloads = into / "apt", into / "downloads"
        downloads.mkdir()
        try:
            private = apt.update_source_list(context, private_folder, mirror, SUITE)
            private.source(context, PACKAGE, VERSION, downloads)
            # Copied: from a mirror on disk apt makes links instead of files.
            _copy(downloads, into, mirror)
            return mirror
        except CommandError as error:
            reasons.append(f"{mirror}: {_reason(error.tail)}")
        except SourceError as error:
            reasons.append(str(error))
        finally:
            remove_tree(private_folder)
            remove_tree(downloads)
    raise SourceError(
        f"the sources {PACKAGE} {VERSION} cannot be had from this machine's mirrors:\n  "
        + "\n  ".join(reasons)
    )


def _reason(tail: str) -> str:
    """Return in one line why apt failed."""
    if re.search(r"Can not find version|Unable to find a source package", tail):
        return f"it no longer has version {VERSION} of {PACKAGE} in {SUITE}"
    if "does not have a Release file" in tail:
        return f"it does not carry {SUITE}"
    return apt.first_error(tail) or "apt-get failed"


def folder_from_environment(name: str) -> Path | None:
    """Return the folder that the environment variable `name` names, if it is set.

    Raises: SourceError: not a folder.
    """
    text = os.environ.get(name)
    if not text:
        return None
    folder = path_meant(text)
    if not folder.is_dir():
        raise SourceError(f"{name}={text}: no such folder")
    return folder
