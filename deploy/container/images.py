"""Build the images vfu-dev and vfu-dev-lab with podman or buildah; `make images` calls it.

What this machine has built already is taken from its cache. Where no registry can be reached, the base is a
root that mmdebstrap makes from Debian's packages, under the registry's name. `podman build` alone does it,
too: the first lines of each Containerfile say how.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from vfu_dev.builds import Cache

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
BASE = "docker.io/library/debian:12-slim"
IMAGES = {"vfu-dev": "Containerfile", "vfu-dev-lab": "Containerfile.lab"}
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# Where a machine without a registry has its sources and packages: mounted, if they are set.
FOLDERS = {"VFU_DEV_SOURCES": "/sources", "VFU_DEV_PACKAGES": "/packages"}


class StepError(Exception):
    """A step that did not work; the message says what to do."""


def run(*command: str | Path) -> None:
    """Run one command, its output here. Raises: StepError."""
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise StepError(
            f"`{' '.join(map(str, command[:3]))} ...` ended with status {error.returncode}"
        ) from None


def builder(asked: str) -> list[str]:
    """Return the command of the tool that builds. Raises: StepError: there is none."""
    for name in (asked,) if asked != "auto" else ("podman", "buildah"):
        if shutil.which(name):
            return [name]
    raise StepError("no podman and no buildah: apt-get install buildah")


def make_base(tool: list[str], suite: str = "bookworm") -> None:
    """Put a root made from Debian's packages under the name of the registry's image. Raises: StepError."""
    if shutil.which("mmdebstrap") is None:
        raise StepError(f"{BASE} cannot be pulled; apt-get install mmdebstrap, and it is made here")
    with tempfile.TemporaryDirectory(prefix="vfu-dev-image-") as folder:
        root = Path(folder, "root.tar")
        run("mmdebstrap", "--quiet", "--variant=minbase", suite, root)
        # Not `import`: buildah has none.
        Path(folder, "Containerfile").write_text('FROM scratch\nADD root.tar /\nCMD ["bash"]\n')
        run(*tool, "build", "--quiet", "--tag", BASE, folder)


def have_base(tool: list[str], base: str) -> None:
    """Make sure that the base image is here. Raises: StepError."""
    if base != "debootstrap":
        done = subprocess.run([*tool, "pull", "--quiet", BASE], check=False, capture_output=True, text=True)
        if done.returncode == 0:
            return
        if base == "registry":
            raise StepError(f"{BASE} cannot be pulled: {done.stderr.strip()}")
    listed = subprocess.run([*tool, "images", "--quiet", BASE], check=False, capture_output=True, text=True)
    if not listed.stdout.strip():
        print(f"{BASE}: no registry; made from Debian's packages", file=sys.stderr)
        make_base(tool)


def build_image(tool: list[str], name: str, isolation: str) -> None:
    """Build one image. Raises: StepError."""
    cache = Cache().root
    cache.mkdir(parents=True, exist_ok=True)
    options = ["--volume", f"{cache}:/var/cache/vfu-dev"]
    # A proxy with a certificate of its own stands between some machines and the packages.
    if CERTIFICATES.is_file():
        options += ["--volume", f"{CERTIFICATES}:/host-certificates.pem:ro"]
        options += ["--build-arg", "PIP_CERT=/host-certificates.pem"]
    for variable, inside in FOLDERS.items():
        if folder := os.environ.get(variable):
            options += [
                "--volume",
                f"{Path(folder).resolve()}:{inside}:ro",
                "--build-arg",
                f"{variable}={inside}",
            ]
    if isolation:
        options += ["--isolation", isolation]
    run(
        *(*tool, "build", "--layers", "--pull=never", "--network=host", *options),
        # Docker's format, because OCI's has no HEALTHCHECK.
        *("--format=docker", "--tag", name, "--file", FOLDER / IMAGES[name]),
        *("--ignorefile", FOLDER / "Containerfile.dockerignore", ROOT),
    )


def command_line() -> argparse.ArgumentParser:
    """Return what parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="IMAGE", help=f"{' '.join(IMAGES)} (default: both)")
    parser.add_argument("--tool", default="auto", choices=["auto", "podman", "buildah"])
    parser.add_argument(
        "--base",
        default="auto",
        choices=["auto", "registry", "debootstrap"],
        help="where debian:12-slim comes from",
    )
    parser.add_argument("--isolation", default="", help="chroot, where containers cannot be nested")
    return parser


def main() -> int:
    """Build what the command line names; returns the exit status."""
    parser = command_line()
    given = parser.parse_args()
    if unknown := set(given.names) - set(IMAGES):
        parser.error(f"no such image: {', '.join(sorted(unknown))} (there are {', '.join(IMAGES)})")
    try:
        tool = builder(given.tool)
        have_base(tool, given.base)
        for name in given.names or IMAGES:
            build_image(tool, name, given.isolation)
    except StepError as error:
        print(f"images.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
