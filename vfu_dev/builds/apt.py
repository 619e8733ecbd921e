"""apt that changes nothing on the machine: package lists and downloads are in a folder of the cache.

This module needs no root and installs nothing. It reads the mirrors from the machine's configuration, so a
proxy or a local mirror is used.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vfu_dev.builds.command import BuildContext, CommandError, build_environment, output_of
from vfu_dev.errors import BuildError

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@dataclass(frozen=True)
class Package:
    """One binary package from the lists: its file and its dependencies.

    `depends` has a tuple of names for each dependency; each name satisfies it.
    """

    name: str
    version: str
    section: str
    download_bytes: int
    depends: tuple[tuple[str, ...], ...]

    @classmethod
    def from_record(cls, record: str) -> Package:
        """Read one stanza of `apt-cache show`."""
        fields = dict(re.findall(r"^([\w-]+): (.*)$", record, re.MULTILINE))
        parts = f"{fields.get('Pre-Depends', '')},{fields.get('Depends', '')}".split(",")
        depends = tuple(
            tuple(choice.split()[0].partition(":")[0] for choice in part.split("|"))
            for part in parts
            if part.strip()
        )
        return cls(
            fields["Package"], fields["Version"], fields.get("Section", ""), int(fields["Size"]), depends
        )


class PrivateApt:
    """apt's tools with package lists and archives under `folder`.

    Args: folder: holds lists and archives; created by the first `update`.
          lines: the sources.list lines to use instead of the machine's own sources.
          bare: resolve as if no package was installed or pinned, so that the result is the same on every
          machine.
    """

    def __init__(self, folder: Path, *lines: str, bare: bool = False) -> None:
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
        self._lines = lines
        if lines:
            self._options += [
                f"-oDir::Etc::sourcelist={folder / 'sources.list'}",
                "-oDir::Etc::sourceparts=/dev/null",
            ]
        if bare:
            self._options += [
                "-oDir::State::status=/dev/null",
                "-oDir::Etc::preferences=/dev/null",
                "-oDir::Etc::preferencesparts=/dev/null",
            ]

    def update(self, context: BuildContext, title: str) -> None:
        """Fetch the package lists. Raises: CommandError."""
        for name in ("lists/partial", "cache/archives/partial"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if self._lines:
            (self.folder / "sources.list").write_text("".join(f"{line}\n" for line in self._lines))
        # Without this, apt-get update ends with 0 when a mirror did not answer.
        self._get(context, ["update", "-oAPT::Update::Error-Mode=any"], title, self.folder)

    def source(self, context: BuildContext, package: str, version: str | None, into: Path) -> None:
        """Download the source package's files into `into` without unpacking; version None: the newest.

        Raises: CommandError.
        """
        wanted = package if version is None else f"{package}={version}"
        title = f"download {package} {version or ''}".rstrip()
        self._get(context, ["source", "--download-only", wanted], title, into)

    def download(self, context: BuildContext, packages: Sequence[str], into: Path, title: str = "") -> None:
        """Download binary packages (NAME or NAME=VERSION) into `into`. Raises: CommandError."""
        self._get(context, ["download", *packages], title or f"download {' '.join(packages)}", into)

    def install_set(self, package: str, release: str) -> list[Package]:
        """Return the packages that apt would install for `package` from `release`, without recommended ones.

        Raises: BuildError: apt finds no such package, or cannot satisfy its dependencies.
        """
        options = ("--simulate", "--no-install-recommends", f"--target-release={release}")
        plan = self._ask("apt-get", *options, "install", package)
        chosen = re.findall(r"^Inst (\S+) \((\S+) ", plan, re.MULTILINE)
        records = self._ask("apt-cache", "show", *(f"{name}={version}" for name, version in chosen))
        return [Package.from_record(record) for record in records.strip().split("\n\n")]

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

    def _ask(self, program: str, *arguments: str) -> str:
        """Return the output of one of apt's tools. Raises: BuildError: its first error message."""
        done = subprocess.run(
            [program, *self._options, *arguments],
            env=build_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise BuildError(first_error(done.stderr.decode(errors="replace")) or f"{program} failed")
        return done.stdout.decode(errors="replace")

    def _get(self, context: BuildContext, arguments: Sequence[str], title: str, cwd: Path) -> None:
        context.run(["apt-get", *self._options, *arguments], title=title, cwd=cwd)


def available() -> bool:
    """Return whether this machine has apt."""
    return shutil.which("apt-get") is not None and shutil.which("apt-cache") is not None


def mirrors(context: BuildContext) -> list[str]:
    """Return the mirrors of this machine's configuration, in their order, each once.

    apt names only mirrors whose package lists are present. If there are none, as in most container images,
    the lists are fetched into a folder of the cache.

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
    return _line("deb-src", mirror, suite, _signed_by() if verified else ["trusted=yes"])


def binary_line(mirror: str, suite: str, architecture: str) -> str:
    """Return the `deb` line for `suite` on `mirror`; apt checks its signature."""
    return _line("deb", mirror, suite, [f"arch={architecture}", *_signed_by()])


def _line(kind: str, mirror: str, suite: str, options: list[str]) -> str:
    chosen = f"[{' '.join(options)}] " if options else ""
    return f"{kind} {chosen}{mirror} {suite} main"


def _signed_by() -> list[str]:
    # Without Debian's keyring: the keys that apt trusts.
    return [f"signed-by={_KEYRING}"] if os.access(_KEYRING, os.R_OK) else []


def first_error(text: str) -> str:
    """Return apt's first error in `text`, without its "E: "; empty if there is none."""
    errors = [line.removeprefix("E: ") for line in text.splitlines() if line.startswith("E: ")]
    return errors[0] if errors else ""


def update_source_list(context: BuildContext, folder: Path, mirror: str, suite: str) -> PrivateApt:
    """Return an apt that knows the source packages of `suite` on `mirror`.

    A stable release does not always have the keys that sign `suite`. Then the list is used unsigned. That is
    safe, because the downloads are compared with sha256 sums pinned in this package.

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
