"""The closed loop of shipped profiles at full size, times included: `make profile-loop`.

`PYTHONPATH=tests/lab python tests/profile_loop.py --help` has the options.

Each profile is replayed, migrated by a QEMU on its own, and imported from the two traces. Exit status 0: each
import is the profile; 1: one is not; 3: each is, but this machine could not keep every time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replaykit import SCALED, Case, Looped, loop, looping

from vfu_dev.builds import artifact
from vfu_dev.builds.qemu_binary import find_qemu
from vfu_dev.profile.shipped import shipped

QEMUS = ("patched", "bookworm-backports", "trixie-backports")
LIMIT_SECONDS = 3600.0
FAILED, LESS = 1, 3


@dataclass(frozen=True)
class Done:
    """One loop."""

    qemu: str
    release: str
    looped: Looped
    seconds: float

    @property
    def reports_late(self) -> int:
        """How many calls the servers say were late."""
        return sum(replay.get("late_calls", 0) for replay in self.looped.replays)

    @property
    def status(self) -> int:
        """What the exit status is for this alone."""
        found = self.looped.comparison
        return FAILED if found.different else LESS if found.late or self.reports_late else 0

    def lines(self) -> list[str]:
        """Return what is printed of it."""
        found, case = self.looped.comparison, self.looped.case
        word = {0: "the same", FAILED: "DIFFERS", LESS: "the same, but late"}[self.status]
        head = f"{case.name} / {case.scale}, QEMU {self.release}: {word}; {len(found.compared)} keys compared"
        lines = [f"{head}, {self.seconds:.0f} s"]
        lines += [f"    {key}: {text}" for key, text in (found.different | found.late).items()]
        if self.reports_late:
            lines.append(f"    the servers say: {self.reports_late} calls were late")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        found, case = self.looped.comparison, self.looped.case
        about = {"profile": case.name, "scale": case.scale, "qemu": self.release, "seconds": self.seconds}
        judged = {"compared": found.compared, "different": found.different, "late": found.late}
        return {**about, **judged, "replays": self.looped.replays}


def main() -> int:
    """Run the loops that the arguments choose; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="append", choices=shipped(), help="this one; may be repeated")
    parser.add_argument("--qemu", action="append", choices=QEMUS, help="with this one; may be repeated")
    parser.add_argument("--scaled", action="store_true", help="as small as in the default test")
    parser.add_argument("--json", type=Path, help="write what was compared")
    chosen = parser.parse_args()
    scales = {case.name: case.scale if chosen.scaled else 1 for case in SCALED}
    loops = [(qemu, name) for qemu in chosen.qemu or QEMUS for name in chosen.profile or shipped()]
    done = []
    for number, (qemu, name) in enumerate(loops, 1):
        print(f"[{number}/{len(loops)}] ", end="", flush=True)
        binary = find_qemu(qemu)
        options = looping(binary.path, artifact("libvfio-user"), 1, timeout_seconds=LIMIT_SECONDS)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            (found,) = loop(options, [Case(name, scales[name])], Path(folder, "logs"), times=True)
        done.append(Done(qemu, binary.version.split()[0], found, round(time.monotonic() - began, 1)))
        print("\n".join(done[-1].lines()), flush=True)
    status = max((one.status for one in done), key=(0, LESS, FAILED).index)
    if status == LESS:
        print("this machine could not keep every time; nothing else may run on it", file=sys.stderr)
    if chosen.json is not None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        rows = [one.to_json() for one in done]
        chosen.json.write_text(json.dumps({"kind": "profile-loop", "version": 1, "loops": rows}, indent=1))
    return status


if __name__ == "__main__":
    sys.exit(main())
