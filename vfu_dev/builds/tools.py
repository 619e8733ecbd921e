"""The Python environment that both builds run meson from."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from vfu_dev.builds import packages
from vfu_dev.builds.cache import input_key, remove_tree
from vfu_dev.builds.command import BuildContext, CommandError, output_of
from vfu_dev.errors import BuildError

# QEMU 10.2's pythondeps.toml accepts meson >= 1.5.0 and would install this version; pycotap is for its tests.
REQUIREMENTS = ("meson==1.9.0", "pycotap")


def meson_python(context: BuildContext) -> Path:
    """Return the interpreter of a virtual environment with `REQUIREMENTS`; it is made in the cache if needed.

    Raises: BuildError: the environment could not be made, or pip could not install; says what is missing.
    """
    base = os.path.realpath(sys.executable)
    version = ".".join(map(str, sys.version_info[:3]))
    key = input_key({"python": base, "version": version, "requirements": REQUIREMENTS})
    folder = context.cache.root / "tools" / f"meson-{key}"
    python = folder / "bin" / "python"
    if _usable(python, folder):
        return python
    with context.cache.lock(f"meson-{key}", context.reporter_waiting("the build tools")):
        if not _usable(python, folder):
            # Scripts in a virtual environment name its path, so it is made in place and marked when complete.
            remove_tree(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            _make(context, Path(base), folder)
            (folder / ".complete").touch()
    return python


def _usable(python: Path, folder: Path) -> bool:
    """Return whether the environment is complete and its interpreter exists; an upgrade may remove it."""
    return (folder / ".complete").exists() and bool(output_of([python, "-c", "import mesonbuild; print(1)"]))


def _make(context: BuildContext, base: Path, folder: Path) -> None:
    python = folder / "bin" / "python"
    has_ensurepip = importlib.util.find_spec("ensurepip") is not None
    has_pip = importlib.util.find_spec("pip") is not None
    if not has_ensurepip and not has_pip:
        # Debian splits ensurepip off into python3-venv.
        if os.geteuid() != 0 or not Path("/usr/bin/apt-get").exists():
            raise packages.MissingPackagesError(["python3-venv"], "Python here has neither ensurepip nor pip")
        packages.install(context, ["python3-venv"])
        has_ensurepip = True
    parent = folder.parent
    if has_ensurepip:
        context.run([base, "-m", "venv", folder], title="create the build environment", cwd=parent)
        pip: list[str | Path] = [python, "-m", "pip"]
    else:
        context.run(
            [base, "-m", "venv", "--without-pip", folder], title="create the build environment", cwd=parent
        )
        pip = [Path(sys.executable), "-m", "pip", "--python", python]
    offline = ["--find-links", str(context.sources)] if context.sources is not None else []
    command = [*pip, "install", "--disable-pip-version-check", "--no-input", *offline, *REQUIREMENTS]
    try:
        context.run(command, title=f"install {' '.join(REQUIREMENTS)}", cwd=parent)
    except CommandError as error:
        raise BuildError(
            f"{error}\n  Without a network: put wheels of {' and '.join(REQUIREMENTS)} into --sources DIR."
        ) from error
