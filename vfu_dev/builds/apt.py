"""apt without touching the machine: package lists and downloads live in a folder of ours.

Nothing here needs root, and nothing here installs. Only the mirrors are the machine's own: they are read from
its configuration, so that a machine behind a proxy, or with a mirror next door, keeps using them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from vfu_dev.builds.command import CommandError, Context, output_of
from vfu_dev.errors import BuildError

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class PrivateApt:
    """apt's tools with package lists and archives under `folder`.

    Args:   folder: holds lists and archives; created by the first `update`.
            line: the one sources.list line to use instead of the machine's own sources.
    """

    def __init__(self, folder: Path, line: str | None = None) -> None:
        self.folder = folder
        self._options = [
            f"-oDir::State::Lists={folder / 'lists'}",
            f"-oDir::Cache={folder / 'cache'}",
            # apt would drop to its own user, which cannot write below a home directory; what it downloads is
            # checked by sum and not installed.
            "-oAPT::Sandbox::User=root",
            "-oAcquire::Retries=3",
            "-oAcquire::Languages=none",
        ]
        self._line = line
        if line is not None:
            self._options += [
                f"-oDir::Etc::sourcelist={folder / 'sources.list'}",
                "-oDir::Etc::sourceparts=/dev/null",
            ]

    def update(self, context: Context, title: str) -> None:
        """Fetch the package lists. Raises: CommandError."""
        for name in ("lists/partial", "cache/archives/partial"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if self._line is not None:
            (self.folder / "sources.list").write_text(self._line + "\n")
        # Without this, apt-get update ends with 0 when a mirror did not answer.
        self._get(context, ["update", "-oAPT::Update::Error-Mode=any"], title, self.folder)

    def source(self, context: Context, package: str, version: str | None, into: Path) -> None:
        """Download the source package's files into `into`, unpacking nothing; None: the newest there is.

        Raises: CommandError.
        """
        wanted = package if version is None else f"{package}={version}"
        title = f"download {package} {version or ''}".rstrip()
        self._get(context, ["source", "--download-only", wanted], title, into)

    def download(self, context: Context, packages: Sequence[str], into: Path) -> None:
        """Download binary packages into `into`. Raises: CommandError."""
        self._get(context, ["download", *packages], f"download {' '.join(packages)}", into)

    def depends(self, package: str) -> list[str]:
        """Return the packages that the candidate version of `package` depends on, alternatives left out."""
        record = output_of(["apt-cache", *self._options, "show", "--no-all-versions", package])
        found = re.search(r"^Depends: (.*)$", record, re.MULTILINE)
        return [part.split()[0] for part in found[1].split(",")] if found else []

    def sites(self) -> list[str]:
        """Return the mirrors that the lists came from, in apt's order, each once."""
        text = output_of(
            ["apt-get", *self._options, "indextargets", "--format", "$(SITE)", "Created-By: Packages"]
        )
        return list(dict.fromkeys(line for line in text.split() if line))

    def _get(self, context: Context, arguments: Sequence[str], title: str, cwd: Path) -> None:
        context.run(["apt-get", *self._options, *arguments], title=title, cwd=cwd)


def available() -> bool:
    """Say whether this machine has apt."""
    return shutil.which("apt-get") is not None and shutil.which("apt-cache") is not None


def mirrors(context: Context) -> list[str]:
    """Return the mirrors that this machine is set up to use, in its order, each once.

    apt names only mirrors whose package lists are there, and images often ship without lists: then they are
    fetched, into a folder of ours.

    Raises: BuildError: apt has no mirror, or none answers.
    """
    machine = output_of(["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages"]).split()
    if not machine:
        private = PrivateApt(context.cache.root / "apt" / "machine")
        private.update(context, "fetch package lists of this machine's mirrors")
        machine = private.sites()
    if not machine:
        raise BuildError("apt on this machine has no mirror set up")
    return list(dict.fromkeys(machine))


def source_line(mirror: str, suite: str, *, verified: bool) -> str:
    """Return the `deb-src` line for `suite` on `mirror`; `verified` asks apt to check the signature."""
    if not verified:
        option = "[trusted=yes] "
    elif os.access(_KEYRING, os.R_OK):
        option = f"[signed-by={_KEYRING}] "
    else:
        option = ""  # whatever keys apt trusts anyway
    return f"deb-src {option}{mirror} {suite} main"


def update_source_list(context: Context, folder: Path, mirror: str, suite: str) -> PrivateApt:
    """Return an apt that knows the source packages of `suite` on `mirror`.

    A stable release does not always have the keys that sign `suite`. Then the list is used unsigned, which
    gives nothing away here: what is taken through it is compared with sha256 sums pinned in this package.

    Raises: CommandError: the mirror does not answer or does not carry the suite.
    """
    private = PrivateApt(folder, source_line(mirror, suite, verified=True))
    title = f"fetch the source list of {suite}"
    try:
        private.update(context, title)
    except CommandError as error:
        if not re.search(r"NO_PUBKEY|EXPKEYSIG|not signed|couldn't be verified|GPG error", error.tail):
            raise
        context.reporter.say(
            f"apt here has no key for {suite}: its list is used unsigned; the pinned sha256 sums decide."
        )
        private = PrivateApt(folder, source_line(mirror, suite, verified=False))
        private.update(context, title)
    return private
