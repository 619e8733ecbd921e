"""Makes the pictures of migrations in this folder anew, each from a run of what it shows.

    python docs/img/make_pictures.py [NAME...]

Two minutes for all of them; needs what `make test` needs (QEMU, the guest, chromium).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
READING = HERE.parent / "reading-a-report.md"

LIVE = (
    "live-page.png",
    "live-page-dark.png",
    "live-page-phone.png",
    "live-page-destination.png",
    "live-page-stuck.png",
    "report-page.png",
    "report-page-dark.png",
    "report-page-phone.png",
)


def runs() -> dict[str, str]:
    """Return the command behind each picture of a report: it stands on the page that shows it."""
    found = {}
    for name in ("converges", "does-not-converge"):
        (command,) = re.findall(
            rf"^(vfu-dev lab migrate .*--out out/{name})$", READING.read_text(), re.MULTILINE
        )
        found[f"report-{name}.png"] = command
    return found


def vfu_dev(command: str, folder: Path, *, status: int = 0) -> None:
    """Run a command of ours in `folder`; it has to end with `status`."""
    argv = [sys.executable, "-m", "vfu_dev", *shlex.split(command)[1:]]
    done = subprocess.run(argv, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    if done.returncode != status:
        sys.exit(f"{command}: exit status {done.returncode}, not {status}; a busy machine writes too slowly")


def make_report(name: str, command: str) -> None:
    """Make a move and take the picture from its JSON, as `vfu-dev report` draws it."""
    folder = Path(tempfile.mkdtemp(prefix="vfu-pictures-"))
    try:
        vfu_dev(command, folder, status=int("--timeout" in command))  # that one does not converge
        out = shlex.split(command)[-1]
        vfu_dev(f"vfu-dev report {out}/report.json --out page.html --png png", folder)
        shutil.copy(folder / "png" / "migration.png", HERE / name)
        if name == "report-converges.png":
            shutil.copy(HERE / name, HERE / "precopy.png")  # the README's
    finally:
        shutil.rmtree(folder)


def make_live() -> None:
    """Have the tests of the live page and of the report's page keep their screenshots."""
    tests = [f"tests/observe/test_{name}.py" for name in ("page", "report_page")]
    argv = [sys.executable, "-m", "pytest", "-q", *tests, "-k", "picture"]
    environment = os.environ | {"VFU_DEV_UPDATE_PICTURES": "1"}
    if subprocess.run(argv, cwd=ROOT, env=environment, check=False).returncode:
        sys.exit("the tests of the pages failed")


def main() -> None:
    """Make all pictures, or those named."""
    wanted = sys.argv[1:]
    for name, command in runs().items():
        if not wanted or name in wanted:
            make_report(name, command)
    if not wanted or any(name in LIVE for name in wanted):
        make_live()


if __name__ == "__main__":
    main()
