"""What a run is made with: QEMU, library and guest, and their identities, which all of its parts share."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import vfu_dev
from vfu_dev.builds import Cache, artifact, native_dir
from vfu_dev.builds.cache import file_digest
from vfu_dev.builds.qemu_binary import with_paths
from vfu_dev.lab.host import require_migration
from vfu_dev.lab.options import MigrateOptions
from vfu_dev.profile import read_profile
from vfu_dev.profile.shipped import profile_path
from vfu_dev.series.scenario import Point

_KEY_DIGITS = 16


@dataclass(frozen=True)
class Artifacts:
    """What was built for the lab. `guest` is needed by points with a Linux guest.

    `chosen` are fields of MigrateOptions that say more about the QEMUs.
    """

    qemu: Path
    library: Path
    guest: Path | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, points: Sequence[Point], asked: Mapping[str, str | None] | None = None) -> Artifacts:
        """Return the artifacts that `points` need.

        Raises: BuildError: one is missing. ConfigError: a profile is missing or wrong. A result of a run is
                read without it, so this is no part of the scenario's own checks.

        Args: asked: the choices of `--qemu`, `--front-end` and `--iommu` (fields of MigrateOptions), as
              `find_qemu` takes them; by default the built QEMU.
        """
        for profile in dict.fromkeys(point["device.profile"] for point in points):
            if profile is not None:
                read_profile(profile_path(profile))
        linux = any(point["qemu.guest"] == "linux" for point in points)
        chosen: dict[str, Any] = with_paths(asked or {"qemu": None})
        return cls(chosen.pop("qemu"), artifact("libvfio-user"), artifact("guest") if linux else None, chosen)

    def options(self, point: Point) -> MigrateOptions:
        """Return the lab's options for `point`."""
        return replace(point.options(self.qemu, self.library, self.guest), **self.chosen)

    def qemus(self) -> dict[str, str]:
        """Return which QEMUs and front ends, in words that mean the same on another machine."""
        chosen = {"qemu": self.qemu, **self.chosen}
        return {
            name: _identity(value) if isinstance(value, Path) else str(value)
            for name, value in chosen.items()
            if value is not None
        }

    def versions(self, point: Point) -> dict[str, str]:
        """Return the versions of the parts of a run; `libvfio-user` is added by the servers.

        Raises: LabError: a QEMU leaves the devices out of a migration; says what to do.
        """
        options = self.options(point)
        both = (options.qemu_source, options.qemu_incoming)
        return own_versions() | {"qemu": " and ".join(dict.fromkeys(map(require_migration, both)))}


def own_versions() -> dict[str, str]:
    """Return the versions of vfu-dev and of Python; `sources` tells two checkouts of a version apart."""
    return {
        "vfu-dev": vfu_dev.__version__,
        "sources": _sources(),
        "python": platform.python_version(),
    }


@cache
def _sources() -> str:
    """Return a digest of this package's modules and of the native sources: what figures depend on."""
    package, digest = Path(vfu_dev.__file__).resolve().parent, hashlib.sha256()
    modules = [
        path for path in package.rglob("*.py") if not path.relative_to(package).parts[0].startswith("_")
    ]
    modules.append(package / "__init__.py")
    native = native_dir()
    parts = [(path, path.relative_to(package)) for path in modules]
    parts += [
        (path, path.relative_to(native))
        for path in native.rglob("*")
        if path.is_file() and path.suffix in (".c", ".h", ".patch")
    ]
    for path, name in sorted(parts, key=lambda part: str(part[1])):
        digest.update(f"{name} {file_digest(path)}\n".encode())
    return digest.hexdigest()[:_KEY_DIGITS]


def _identity(path: Path) -> str:
    """Return the artifact's name and key where it comes from the cache, else a digest of the program."""
    artifacts = Cache().root / "artifacts"
    if path.is_relative_to(artifacts):
        return path.relative_to(artifacts).parts[0]
    return f"sha256:{file_digest(path)[:_KEY_DIGITS]}"
