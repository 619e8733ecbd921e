"""Recipes and artifacts: built once, by one process, whole, and again exactly when an input changes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serverkit import PATIENCE_SECONDS

from vfu_dev.builds import artifact, prebuilt, recipe_named
from vfu_dev.builds.cache import Cache
from vfu_dev.builds.command import BuildContext, CommandError
from vfu_dev.builds.making import BuildOptions, build
from vfu_dev.builds.progress import Reporter
from vfu_dev.builds.recipe import Facts, NotBuiltError, Recipe, read_manifest
from vfu_dev.builds.recipes import RECIPES
from vfu_dev.errors import BuildError


class Tiny:
    """A recipe that runs one real command; counts how often."""

    def __init__(self, script: str = "echo content > product") -> None:
        self.script = script
        self.flags = ["-O2"]
        self.made = 0

    def recipe(self, **more: object) -> Recipe:
        """Return the recipe, with some fields replaced."""
        fields: dict[str, object] = {
            "name": "tiny",
            "summary": "a file",
            "product": "product",
            "inputs": lambda: {"flags": self.flags},
            "make": self.make,
        }
        return Recipe(**(fields | more))  # type: ignore[arg-type]

    def make(self, context: BuildContext, out: Path) -> Facts:
        """Run the script in the artifact's folder."""
        self.made += 1
        context.run(["sh", "-c", self.script], title="make it", cwd=out)
        return {"flags": self.flags}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def quiet() -> Reporter:
    return Reporter(io.StringIO())


def test_a_second_build_does_nothing_and_a_changed_input_builds_anew(cache: Cache) -> None:
    tiny = Tiny()
    recipe = tiny.recipe()
    with pytest.raises(NotBuiltError, match="run: vfu-dev build tiny"):
        recipe.find(cache)
    first = build(recipe, cache, BuildOptions(), quiet())
    again = build(recipe, cache, BuildOptions(), quiet())
    assert (first.built, again.built, tiny.made) == (True, False, 1)
    assert first.path == again.path == recipe.find(cache)
    assert first.path.read_text() == "content\n"

    tiny.flags = ["-O3"]
    other = build(recipe, cache, BuildOptions(), quiet())
    assert (other.built, tiny.made) == (True, 2)
    assert other.path != first.path
    assert first.path.exists(), "the artifact of the old input is still whole, for whoever uses it"


def test_what_a_wheel_carries_is_used_until_it_is_built_here(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`again` builds it, and that one is found from then on. Until anything is built, no key is computed."""
    carried = tmp_path / "carried" / "tiny"
    carried.mkdir(parents=True)
    (carried / "product").write_text("from the wheel\n")
    monkeypatch.setattr(prebuilt, "prebuilt_root", lambda: tmp_path / "carried")
    tiny = Tiny()
    asked = []
    recipe = tiny.recipe(inputs=lambda: asked.append(1) or {})
    found = build(recipe, cache, BuildOptions(), quiet())
    assert (found.built, tiny.made, asked) == (False, 0, [])
    assert found.path == recipe.find(cache) == carried / "product"

    built = build(recipe, cache, BuildOptions(), quiet(), again=True)
    assert (built.built, tiny.made) == (True, 1)
    assert recipe.find(cache) == built.path
    assert built.path.read_text() == "content\n"


def test_inputs_that_change_during_a_build_are_not_published_under_the_old_name(cache: Cache) -> None:
    tiny = Tiny()

    def edited(context: BuildContext, out: Path) -> Facts:
        tiny.flags = ["-O3"]
        return tiny.make(context, out)

    with pytest.raises(BuildError, match="changed meanwhile"):
        build(tiny.recipe(make=edited), cache, BuildOptions(), quiet())
    assert not list((cache.root / "tmp").iterdir())
    assert build(tiny.recipe(), cache, BuildOptions(), quiet()).built


def test_the_manifest_says_what_went_in_and_what_came_out(cache: Cache) -> None:
    recipe = Tiny().recipe()
    build(recipe, cache, BuildOptions(), quiet())
    manifest = read_manifest(recipe.folder(cache))
    assert manifest["inputs"] == {"flags": ["-O2"]}
    assert manifest["key"] == recipe.key()
    assert isinstance(manifest["seconds"], float)
    files = manifest["files"]
    assert isinstance(files, dict)
    assert files["product"]["bytes"] == 8
    json.dumps(manifest)


def test_a_failed_build_publishes_nothing_and_names_its_log(cache: Cache) -> None:
    tiny = Tiny("echo half > product; echo broken; exit 1")
    with pytest.raises(CommandError, match="broken") as caught:
        build(tiny.recipe(), cache, BuildOptions(), quiet())
    assert caught.value.log.is_file()
    assert not tiny.recipe().folder(cache).exists()
    assert list((cache.root / "tmp").iterdir()) == []
    tiny.script = "echo content > product"
    assert build(tiny.recipe(), cache, BuildOptions(), quiet()).built


def test_an_artifact_is_named_after_what_its_dependencies_are_made_of(cache: Cache) -> None:
    base, top = Tiny(), Tiny()
    base_recipe = base.recipe(name="base")
    recipe = top.recipe(after=(base_recipe,))
    assert build(recipe, cache, BuildOptions(), quiet()).built
    assert base_recipe.find(cache).exists()
    before = recipe.key()
    base.flags = ["-g"]
    assert recipe.key() != before
    assert build(recipe, cache, BuildOptions(), quiet()).built
    assert (base.made, top.made) == (2, 2)


BUILDER = """
import sys
from pathlib import Path
from vfu_dev.builds.cache import Cache
from vfu_dev.builds.progress import Reporter
from vfu_dev.builds.making import BuildOptions, build
from vfu_dev.builds.recipe import Recipe

def make(context, out):
    with open(sys.argv[2], "a") as count:
        count.write("made\\n")
    context.run(["sh", "-c", 'echo content > product; echo up > "$0"; read line < "$1"', *sys.argv[3:]],
                title="make it", cwd=out)
    return {}

recipe = Recipe("tiny", "", "product", lambda: {}, make)
built = build(recipe, Cache(Path(sys.argv[1])), BuildOptions(), Reporter())
print(built.built, built.path.read_text().strip())
"""


def test_of_two_builds_at_once_one_builds_and_the_other_waits_and_says_so(tmp_path: Path) -> None:
    up, go = tmp_path / "up", tmp_path / "go"
    os.mkfifo(up)
    os.mkfifo(go)
    command = [
        sys.executable,
        "-c",
        BUILDER,
        str(tmp_path / "cache"),
        str(tmp_path / "count"),
        str(up),
        str(go),
    ]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first,
        up.open() as up_file,
    ):
        assert up_file.readline() == "up\n"
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as second:
            assert second.stderr is not None
            assert second.stderr.readline().startswith(f"process {first.pid} is busy with building tiny")
            go.write_text("go\n")
            assert first.communicate(timeout=PATIENCE_SECONDS)[0] == "True content\n"
            assert second.communicate(timeout=PATIENCE_SECONDS)[0] == "False content\n"
    assert (tmp_path / "count").read_text() == "made\n"


def test_a_file_from_the_environment_takes_the_artifacts_place(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny = Tiny()
    recipe = tiny.recipe(override="VFU_DEV_TINY")
    mine = tmp_path / "mine"
    for missing in ("~nobody-has-this-name/mine", str(mine)):
        monkeypatch.setenv("VFU_DEV_TINY", missing)
        with pytest.raises(BuildError, match=r"VFU_DEV_TINY=.*: no such file"):
            recipe.find(cache)
    mine.touch()
    assert recipe.find(cache) == mine
    assert build(recipe, cache, BuildOptions(), quiet()).path == mine
    assert tiny.made == 0


def test_asking_for_an_artifact_says_what_to_run_or_which_there_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VFU_DEV_CACHE", str(tmp_path))
    monkeypatch.delenv("VFU_DEV_QEMU", raising=False)
    with pytest.raises(BuildError, match="run: vfu-dev build qemu"):
        artifact("qemu")
    with pytest.raises(BuildError, match=r"there are: .*guest"):
        artifact("qmeu")
    assert list(tmp_path.iterdir()) == [], "looking for an artifact wrote to the cache"


def test_variants_have_names_of_their_own_and_do_not_share_artifacts() -> None:
    keys = {name: recipe_named(name).key() for name in RECIPES}
    assert len(set(keys.values())) == len(keys)


def test_the_patches_of_one_artifact_do_not_touch_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder in ("libvfio-user", "qemu", "guest"):
        (tmp_path / folder).mkdir()
    for module in ("libvfio_user", "fuzz", "qemu", "guest"):
        monkeypatch.setattr(f"vfu_dev.builds.{module}.native_dir", lambda: tmp_path)

    def keys() -> dict[str, str]:
        return {name: recipe_named(name).key() for name in RECIPES}

    def changed(before: dict[str, str]) -> set[str]:
        return {name for name, key in keys().items() if key != before[name]}

    before = keys()
    (tmp_path / "qemu" / "0001-a.patch").write_text("diff --git a/x b/x\n")
    assert changed(before) == {"qemu", "qemu-asan"}
    before = keys()
    (tmp_path / "guest" / "init").write_text("#!/bin/sh\n")
    assert changed(before) == {"guest"}
    before = keys()
    (tmp_path / "libvfio-user" / "src").mkdir()
    (tmp_path / "libvfio-user" / "src" / "new.c").write_text("int x;\n")
    assert changed(before) == {"fuzz-targets", *(name for name in RECIPES if name.startswith("libvfio-user"))}


# Looks for an artifact with no descriptor free for the compiler that is asked for its version.
FEW_DESCRIPTORS = """
import os, resource
import vfu_dev.builds
free = os.dup(0)
os.close(free)
resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, free + 1))
try:
    vfu_dev.builds.artifact("libvfio-user")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_limit_on_descriptors_is_not_taken_for_a_missing_artifact(tmp_path: Path) -> None:
    """What the key is made of could not be found out, so nobody knows whether the artifact is there."""
    environment = {name: value for name, value in os.environ.items() if name != "VFU_DEV_LIBVFIO_USER"}
    (tmp_path / "artifacts").mkdir()
    environment["VFU_DEV_CACHE"] = str(tmp_path)  # which does not remember what the compiler answers
    done = subprocess.run(
        [sys.executable, "-c", FEW_DESCRIPTORS], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "BuildError cc cannot be run: Too many open files (see ulimit -n)\n"
