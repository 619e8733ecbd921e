"""Applies patch series, and updates a tree that objects are built from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from vfu_dev.builds.cache import remove_tree
from vfu_dev.builds.command import BuildContext, CommandError
from vfu_dev.builds.patch_series import Patch
from vfu_dev.errors import BuildError
from vfu_dev.whole import write_whole


class PatchError(BuildError):
    """A patch does not apply. `patch` is its path, `output` what patch(1) said."""

    def __init__(self, patch: Path, output: str) -> None:
        self.patch = patch
        self.output = output
        super().__init__(f"{patch.name} does not apply to the pinned sources ({patch})\n{output}")


def apply_series(context: BuildContext, series: Sequence[Patch], tree: Path, title: str) -> None:
    """Apply `series` to `tree` in place, as strictly as `git am`: context must match, offsets may differ.

    Raises: PatchError: one does not apply; the tree is then partly patched.
    """
    if not series:
        return
    # patch(1) comes with dpkg-dev, which builds need in any case; git is not needed.
    command = ["patch", "-p1", "--fuzz=0", "--batch", "--forward", "--no-backup-if-mismatch", "-r", "-"]
    title = f"{title}: apply {len(series)} patches"
    with context.reporter.step(title) as step:
        for number, patch in enumerate(series, start=1):
            try:
                context.run([*command, "--input", patch.path], title=title, cwd=tree, step=step)
            except CommandError as error:
                raise PatchError(patch.path, error.tail) from error
            step.update(number, len(series))


def link_tree(source: Path, destination: Path) -> None:
    """Make `destination` a copy of the folder `source` whose files are links to the same data.

    For trees whose files are replaced and never written in place; `sync_tree` does that.
    """
    shutil.copytree(source, destination, symlinks=True, copy_function=os.link)


def sync_tree(
    context: BuildContext, series: Sequence[Patch], pristine: Path, tree: Path, title: str
) -> list[str]:
    """Make `tree`, a copy of `pristine` with any earlier series in it, equal to `pristine` plus `series`.

    Only files whose content differs are replaced and get new times, so a build redoes only what depends on
    them. The call may be killed at any point: it first records every file that it will touch, and the next
    call starts from that record.

    Returns: the files that changed, relative to the tree.
    Raises: PatchError: the series does not apply; the tree has not been touched.
    """
    record = tree.parent / "touched.json"
    before: set[str] = set(json.loads(record.read_text())) if record.exists() else set()
    now = {name for patch in series for name in patch.touches}
    scratch = tree.parent / "patched"
    remove_tree(scratch)
    scratch.mkdir()
    for name in now:
        if (pristine / name).is_file():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(pristine / name, scratch / name)
    apply_series(context, series, scratch, title)

    write_whole(record, json.dumps(sorted(before | now)))
    changed = []
    for name in sorted(before | now):
        wanted = scratch / name if name in now else pristine / name
        present = tree / name
        if wanted.is_file():
            if not present.is_file() or not _same(wanted, present):
                present.parent.mkdir(parents=True, exist_ok=True)
                replacement = present.with_name(present.name + ".vfu-dev-new")
                # copy(), not copy2(): the time has to be now, even when a file goes back to what it was.
                shutil.copy(wanted, replacement)
                replacement.replace(present)
                changed.append(name)
        elif present.exists():
            present.unlink()
            changed.append(name)
    write_whole(record, json.dumps(sorted(now)))
    remove_tree(scratch)
    return changed


def _same(one: Path, other: Path) -> bool:
    same_mode = (one.stat().st_mode & 0o111) == (other.stat().st_mode & 0o111)
    return same_mode and one.read_bytes() == other.read_bytes()
