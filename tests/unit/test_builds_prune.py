"""`vfu-dev build --prune`: what it lists, what it removes, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from schemakit import conforms

from vfu_dev.builds import Cache, recipe_named
from vfu_dev.cli.build import command

OLD = "libvfio-user-0123456789abcdef"
GONE = "no-recipe-0123456789abcdef"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """A cache with one current artifact, two that no recipe names, and a folder that is no artifact."""
    monkeypatch.setenv("VFU_DEV_CACHE", str(tmp_path))
    current = recipe_named("libvfio-user").folder(Cache()).name
    for name in (current, OLD, GONE, "notes"):
        folder = tmp_path / "artifacts" / name
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(bytes(range(256)) * 64)
    return Cache()


def names(cache: Cache) -> set[str]:
    return {path.name for path in (cache.root / "artifacts").iterdir()}


def pruned(cache: Cache, *options: str) -> dict[str, str]:
    """Return folder name -> state, from the JSON."""
    file = cache.root.with_name("pruned.json")
    done = CliRunner().invoke(command, ["--prune", *options, "--json", str(file)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    conforms("build-prune", found)
    counted = [one["size_bytes"] for one in found["artifacts"] if one["state"] != "locked"]
    assert all(size >= 256 * 64 for size in counted)
    assert found["size_bytes"] == sum(counted)
    assert all(one["path"] in done.output for one in found["artifacts"])
    return {Path(one["path"]).name: one["state"] for one in found["artifacts"]}


def test_it_lists_first_and_removes_with_yes(cache: Cache) -> None:
    before = names(cache)
    assert pruned(cache) == {OLD: "there", GONE: "there"}
    assert names(cache) == before
    assert not (cache.root / "locks").exists()
    assert pruned(cache, "--yes") == {OLD: "removed", GONE: "removed"}
    assert names(cache) == before - {OLD, GONE}
    assert list((cache.root / "tmp").iterdir()) == []
    assert pruned(cache, "--yes") == {}


def test_what_a_build_holds_is_left(cache: Cache) -> None:
    with cache.lock(OLD):
        assert pruned(cache) == {OLD: "locked", GONE: "there"}
        assert pruned(cache, "--yes") == {OLD: "locked", GONE: "removed"}
        assert OLD in names(cache)
    assert pruned(cache, "--yes") == {OLD: "removed"}


@pytest.mark.parametrize("arguments", [["--yes"], ["--prune", "qemu"], ["--prune", "--all"]])
def test_it_does_not_build_and_yes_is_for_it_alone(cache: Cache, arguments: list[str]) -> None:
    before = names(cache)
    assert CliRunner().invoke(command, arguments).exit_code != 0
    assert names(cache) == before
