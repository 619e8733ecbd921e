"""Patch series: strict, in order, and incremental where objects depend on file times."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vfu_dev.builds.command import BuildContext
from vfu_dev.builds.patch_series import read_series
from vfu_dev.builds.patches import PatchError, apply_series, link_tree, sync_tree
from vfu_dev.errors import BuildError


@pytest.fixture
def pristine(tmp_path: Path) -> Path:
    tree = tmp_path / "pristine"
    (tree / "hw").mkdir(parents=True)
    (tree / "hw" / "a.c").write_text("int a(void)\n{\n    return 1;\n}\n")
    (tree / "hw" / "b.c").write_text("int b(void)\n{\n    return 2;\n}\n")
    (tree / "main.c").write_text("int a(void), b(void);\nint main(void)\n{\n    return a() + b();\n}\n")
    return tree


@pytest.fixture
def series(tmp_path: Path) -> Path:
    folder = tmp_path / "series"
    folder.mkdir()
    return folder


def write_patch(series: Path, name: str, path: str, old: str, new: str) -> None:
    """Write a patch that replaces the third line of a four-line function, with git's headers."""
    function = Path(path).stem
    (series / name).write_text(
        f"From 0 Mon Sep 17 00:00:00 2001\nFrom: A <a@example.org>\nSubject: [PATCH] {name}\n\n---\n"
        f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n@@ -1,4 +1,4 @@\n"
        f" int {function}(void)\n {{\n-    return {old};\n+    return {new};\n }}\n-- \n2.39.5\n"
    )


def add_file_patch(series: Path, name: str, path: str) -> None:
    (series / name).write_text(
        f"Subject: [PATCH] new\n\n---\ndiff --git a/{path} b/{path}\nnew file mode 100755\nindex 000..123\n"
        f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+#!/bin/sh\n"
    )


def remove_file_patch(series: Path, name: str, path: str, lines: list[str]) -> None:
    body = "".join(f"-{line}\n" for line in lines)
    (series / name).write_text(
        f"Subject: [PATCH] gone\n\n---\ndiff --git a/{path} b/{path}\ndeleted file mode 100644\n"
        f"--- a/{path}\n+++ /dev/null\n@@ -1,{len(lines)} +0,0 @@\n{body}"
    )


def times(tree: Path) -> dict[str, int]:
    return {
        path.relative_to(tree).as_posix(): path.stat().st_mtime_ns
        for path in tree.rglob("*")
        if path.is_file()
    }


def test_patches_apply_in_the_order_of_their_names(
    context: BuildContext, pristine: Path, series: Path
) -> None:
    write_patch(series, "0002-more.patch", "hw/a.c", "10", "100")
    write_patch(series, "0001-first.patch", "hw/a.c", "1", "10")
    apply_series(context, read_series(series), pristine, "x")
    assert "return 100;" in (pristine / "hw" / "a.c").read_text()


def test_a_patch_whose_context_differs_is_refused_by_name(
    context: BuildContext, pristine: Path, series: Path
) -> None:
    write_patch(series, "0001-stale.patch", "hw/a.c", "7", "8")
    with pytest.raises(PatchError, match=r"0001-stale\.patch does not apply") as caught:
        apply_series(context, read_series(series), pristine, "x")
    assert caught.value.patch.name == "0001-stale.patch"
    assert "FAILED" in caught.value.output


def test_a_patch_that_is_already_in_is_refused(context: BuildContext, pristine: Path, series: Path) -> None:
    write_patch(series, "0001-once.patch", "hw/a.c", "1", "10")
    apply_series(context, read_series(series), pristine, "x")
    with pytest.raises(PatchError):
        apply_series(context, read_series(series), pristine, "x")


@pytest.mark.parametrize("path", ["../outside.c", "hw/../../outside.c"])
def test_a_patch_that_names_files_outside_the_tree_is_refused(series: Path, path: str) -> None:
    add_file_patch(series, "0001-bad.patch", path)
    with pytest.raises(BuildError, match="outside the tree"):
        read_series(series)


def test_a_file_that_is_no_git_patch_is_refused(series: Path) -> None:
    (series / "0001.patch").write_text("hello\n")
    with pytest.raises(BuildError, match="not a patch in git's format"):
        read_series(series)


def test_only_files_whose_content_changes_get_new_times(
    context: BuildContext, pristine: Path, series: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "work" / "source"
    tree.parent.mkdir()
    link_tree(pristine, tree)
    original = (pristine / "hw" / "a.c").read_text()
    old = times(tree)

    write_patch(series, "0001-a.patch", "hw/a.c", "1", "10")
    assert sync_tree(context, read_series(series), pristine, tree, "x") == ["hw/a.c"]
    first = times(tree)
    assert first["hw/a.c"] > old["hw/a.c"]
    assert (pristine / "hw" / "a.c").read_text() == original, "the pristine tree was written through a link"

    write_patch(series, "0002-b.patch", "hw/b.c", "2", "20")
    assert sync_tree(context, read_series(series), pristine, tree, "x") == ["hw/b.c"]
    assert times(tree)["hw/a.c"] == first["hw/a.c"]
    assert sync_tree(context, read_series(series), pristine, tree, "x") == []

    second = times(tree)
    assert sync_tree(context, [], pristine, tree, "x") == ["hw/a.c", "hw/b.c"]
    assert (tree / "hw" / "a.c").read_text() == original
    assert times(tree)["hw/a.c"] > second["hw/a.c"], "a file that went back would not be compiled again"
    assert times(tree)["main.c"] == old["main.c"]


def test_files_that_a_series_adds_and_removes_come_and_go(
    context: BuildContext, pristine: Path, series: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "work" / "source"
    tree.parent.mkdir()
    link_tree(pristine, tree)
    add_file_patch(series, "0001-new.patch", "scripts/new.sh")
    remove_file_patch(series, "0002-gone.patch", "hw/b.c", (pristine / "hw/b.c").read_text().splitlines())
    sync_tree(context, read_series(series), pristine, tree, "x")
    assert os.access(tree / "scripts" / "new.sh", os.X_OK)
    assert not (tree / "hw" / "b.c").exists()
    sync_tree(context, [], pristine, tree, "x")
    assert not (tree / "scripts" / "new.sh").exists()
    assert (tree / "hw" / "b.c").read_text() == (pristine / "hw" / "b.c").read_text()


def test_a_series_that_does_not_apply_leaves_the_tree_as_it_was(
    context: BuildContext, pristine: Path, series: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "work" / "source"
    tree.parent.mkdir()
    link_tree(pristine, tree)
    before = times(tree)
    write_patch(series, "0001-good.patch", "hw/a.c", "1", "10")
    write_patch(series, "0002-stale.patch", "hw/b.c", "9", "20")
    with pytest.raises(PatchError):
        sync_tree(context, read_series(series), pristine, tree, "x")
    assert times(tree) == before


def test_a_sync_that_was_killed_half_way_is_put_right_by_the_next(
    context: BuildContext, pristine: Path, series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "work" / "source"
    tree.parent.mkdir()
    link_tree(pristine, tree)
    write_patch(series, "0001-a.patch", "hw/a.c", "1", "10")
    write_patch(series, "0002-b.patch", "hw/b.c", "2", "20")
    real_copy = shutil.copy

    def copy_once(source: Path, target: Path) -> object:
        if "b.c" in str(target):
            raise KeyboardInterrupt
        return real_copy(source, target)

    monkeypatch.setattr("vfu_dev.builds.patches.shutil.copy", copy_once)
    with pytest.raises(KeyboardInterrupt):
        sync_tree(context, read_series(series), pristine, tree, "x")
    assert "return 10;" in (tree / "hw" / "a.c").read_text()
    monkeypatch.undo()
    # The next build wants no patches at all: what the killed one had done must not stay.
    assert sync_tree(context, [], pristine, tree, "x") == ["hw/a.c"]
    assert (tree / "hw" / "a.c").read_text() == (pristine / "hw" / "a.c").read_text()


@pytest.mark.skipif(not shutil.which("ninja") or not shutil.which("cc"), reason="needs ninja and cc")
def test_ninja_compiles_again_exactly_what_a_changed_patch_touches(
    context: BuildContext, pristine: Path, series: Path, tmp_path: Path
) -> None:
    (pristine / "build.ninja").write_text(
        "rule cc\n  command = cc -c -o $out $in\nrule link\n  command = cc -o $out $in\n"
        "build a.o: cc hw/a.c\nbuild b.o: cc hw/b.c\nbuild main.o: cc main.c\n"
        "build prog: link main.o a.o b.o\n"
    )
    tree = tmp_path / "work" / "source"
    tree.parent.mkdir()
    link_tree(pristine, tree)

    def build() -> tuple[int, list[str]]:
        done = subprocess.run(["ninja", "-v"], cwd=tree, capture_output=True, text=True, check=True)
        compiled = [line.split()[-1] for line in done.stdout.splitlines() if " -c " in line]
        return subprocess.run([tree / "prog"], check=False).returncode, sorted(compiled)

    sync_tree(context, [], pristine, tree, "x")
    assert build() == (3, ["hw/a.c", "hw/b.c", "main.c"])
    write_patch(series, "0001-a.patch", "hw/a.c", "1", "10")
    sync_tree(context, read_series(series), pristine, tree, "x")
    assert build() == (12, ["hw/a.c"])
    write_patch(series, "0001-a.patch", "hw/a.c", "1", "11")
    sync_tree(context, read_series(series), pristine, tree, "x")
    assert build() == (13, ["hw/a.c"])
    sync_tree(context, [], pristine, tree, "x")
    assert build() == (3, ["hw/a.c"])
