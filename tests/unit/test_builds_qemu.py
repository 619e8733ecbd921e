"""QEMU's object tree: configured once, kept between builds, distrusted after a build that was killed.

The source tree is a small one with a `configure` of its own; ninja, the compiler and the patches are real.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vfu_dev.builds.cache import Cache
from vfu_dev.builds.command import BuildContext, CommandError
from vfu_dev.builds.patch_series import read_series
from vfu_dev.builds.progress import Reporter
from vfu_dev.builds.qemu import _compile

pytestmark = pytest.mark.skipif(
    not shutil.which("ninja") or not shutil.which("cc"), reason="needs ninja and cc"
)

CONFIGURE = """#!/bin/sh
source=$(dirname "$0")
echo "$@" >> configured
cat > build.ninja <<END
rule cc
  command = cc -o \\$out \\$in
build qemu-system-x86_64: cc $source/main.c
END
"""
PATCH = """Subject: [PATCH] answer

---
diff --git a/main.c b/main.c
--- a/main.c
+++ b/main.c
@@ -1 +1 @@
-int main(void) { return 1; }
+int main(void) { return 2; }
"""


class Tree:
    """One pair of source and object trees, and what was said while it was built."""

    def __init__(self, folder: Path) -> None:
        self.pristine = folder / "pristine"
        self.pristine.mkdir()
        (self.pristine / "configure").write_text(CONFIGURE)
        (self.pristine / "configure").chmod(0o755)
        (self.pristine / "main.c").write_text("int main(void) { return 1; }\n")
        self.series = folder / "series"
        self.series.mkdir()
        (self.series / "0001-answer.patch").write_text(PATCH)
        self.work = folder / "work"
        self.out = io.StringIO()
        cache = Cache(folder / "cache")
        self.context = BuildContext(cache, Reporter(self.out), cache.log_path("qemu", "k"), jobs=1)

    def build(self, *, patched: bool) -> int:
        """Build; return the exit status of the program that came out."""
        series = read_series(self.series) if patched else []
        flags = ("--target-list=x86_64-softmmu",)
        _compile(self.context, self.work, self.pristine, Path(sys.executable), flags, series, "qemu")
        return subprocess.run([self.work / "build" / "qemu-system-x86_64"], check=False).returncode

    def configured(self) -> int:
        """Return how often this object tree was configured."""
        return len((self.work / "build" / "configured").read_text().splitlines())


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_with_and_without_patches_share_one_object_tree(tree: Tree) -> None:
    assert tree.build(patched=False) == 1
    assert tree.build(patched=True) == 2
    assert tree.build(patched=False) == 1
    assert tree.configured() == 1
    flags = (tree.work / "build" / "configured").read_text()
    assert flags == f"--python={sys.executable} --target-list=x86_64-softmmu\n"


def test_a_failed_compilation_leaves_a_tree_that_the_next_build_goes_on_with(tree: Tree) -> None:
    assert tree.build(patched=False) == 1
    good = (tree.series / "0001-answer.patch").read_text()
    (tree.series / "0001-answer.patch").write_text(good.replace("return 2;", "retrun 2;"))
    with pytest.raises(CommandError, match="retrun"):
        tree.build(patched=True)
    (tree.series / "0001-answer.patch").write_text(good)
    assert tree.build(patched=True) == 2
    assert tree.configured() == 1


def test_after_a_killed_build_objects_are_made_anew(tree: Tree) -> None:
    assert tree.build(patched=False) == 1
    (tree.work / "busy").touch()  # what a killed build cannot remove
    (tree.work / "build" / "qemu-system-x86_64").write_bytes(b"half written")
    assert tree.build(patched=False) == 1
    assert "was killed" in tree.out.getvalue()
    assert not (tree.work / "busy").exists()
    assert tree.configured() == 1


def test_a_configure_that_failed_is_done_again_from_nothing(tree: Tree, tmp_path: Path) -> None:
    """Its build.ninja may be there already, and incomplete."""
    broken = tmp_path / "broken"
    broken.touch()
    configure = tree.pristine / "configure"
    configure.write_text(CONFIGURE + f"if [ -e {broken} ]; then echo junk > build.ninja; exit 1; fi\n")
    with pytest.raises(CommandError, match="configure failed"):
        tree.build(patched=False)
    assert (tree.work / "build" / "build.ninja").read_text() == "junk\n"
    broken.unlink()
    assert tree.build(patched=False) == 1
    assert tree.configured() == 1
