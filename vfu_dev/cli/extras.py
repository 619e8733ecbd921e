"""Which Python packages an extra of vfu-dev installs, so that messages name them instead of the extra.

`pip install 'vfu-dev[lab]'` would fetch whatever package an index has under that name.
"""

from __future__ import annotations

import re

LAB, DASK = "lab", "dask"
# Where an extra of this package brings it: all others are the lab's.
_EXTRAS = {"distributed": DASK}
# Where the name to import is not that of the package.
_PACKAGES = {"qemu": "qemu.qmp"}


def packages_of(extra: str) -> list[str]:
    """Return the requirements of `extra` as pip takes them; empty where this package is not installed."""
    from importlib import metadata  # takes as long as click, and few commands get here

    try:
        required = metadata.requires("vfu-dev") or []
    except metadata.PackageNotFoundError:
        return []
    marked = (line.partition(";") for line in required)
    return [
        requirement.strip()
        for requirement, _, marker in marked
        if re.search(rf"extra == ['\"]{extra}['\"]", marker)
    ]


def missing_text(module: str) -> str:
    """Return what to say, and to do, when `module` of another package cannot be imported."""
    name = module.partition(".")[0]
    line, package = install_line(_EXTRAS.get(name, LAB)), _PACKAGES.get(name, name)
    return f"the Python package {package} is missing; run: {line} (see vfu-dev doctor)"


def install_line(extra: str = LAB) -> str:
    """Return the command that installs what the lab, or another extra, needs."""
    known = {LAB: ["qemu.qmp", "matplotlib", "jinja2", "scipy"], DASK: ["distributed"]}
    wanted = packages_of(extra) or known[extra]
    return "pip install " + " ".join(f"'{name}'" for name in wanted)
