"""README's drawing of the folders is what the imports are, and nothing imports in a circle."""

from __future__ import annotations

import ast
import functools
import gc
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path

import click
import pytest

import vfu_dev
from vfu_dev.builds import native_dir
from vfu_dev.builds.compiler import compiler_version
from vfu_dev.cli import cli

PACKAGE = Path(vfu_dev.__file__).parent
README = Path(__file__).parents[2] / "README.md"
# Modules that stand alone beneath all folders, and the one above them.
GROUND = {
    "__init__",
    "closing",
    "socket_paths",
    "convergence",
    "errors",
    "exports",
    "machine",
    "qemu_events",
    "qemu_trace",
    "logs",
    "sizes",
    "toml_source",
    "generated",
    "uapi",
    "whole",
}
ABOVE = {"__main__"}

Graph = dict[str, set[str]]


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Return one circle of the graph, empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def reachable(graph: Graph) -> set[tuple[str, str]]:
    """Return every (start, end) that arrows lead to, one or more."""
    found = set()
    for start in graph:
        waiting, seen = list(graph[start]), set()
        while waiting:
            end = waiting.pop()
            if end not in seen:
                seen.add(end)
                waiting += graph.get(end, ())
        found |= {(start, end) for end in seen}
    return found


@functools.cache
def module_names() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


@functools.cache
def imports() -> Graph:
    """Return what each module imports of the package: anywhere in it, under TYPE_CHECKING too."""
    modules = module_names()
    graph: Graph = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: relative imports are not read here"
                assert node.module
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    found.add(submodule if submodule in modules else node.module)
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = (found & modules.keys()) - {name}
    return graph


def folder_of(module: str) -> str:
    """Return the folder below the package, or the module's own name where it lies in none."""
    parts = module_names()[module].relative_to(PACKAGE).with_suffix("").parts
    return "/".join(parts[:-1]) or parts[0]


def folder_imports() -> Graph:
    """Return what each folder imports of others, ground and top left out."""
    graph: Graph = {}
    for module, found in imports().items():
        graph.setdefault(folder_of(module), set()).update(folder_of(other) for other in found)
    return {
        folder: {other for other in others if other != folder and other not in GROUND}
        for folder, others in graph.items()
        if folder not in GROUND | ABOVE
    }


def drawn() -> Graph:
    """Return the arrows of README's drawing: the first indented block of its section."""
    section = README.read_text().partition("## How it is put together")[2]
    block = re.search(r"(?:^ {4}.+\n)+", section, re.MULTILINE)
    assert block, "README has no drawing"
    graph: Graph = {}
    for line in block[0].splitlines():
        groups = [[name.strip() for name in group.split(",")] for group in line.split("→")]
        for names, others in pairwise(groups):
            for name, other in product(names, others):
                graph.setdefault(name, set()).add(other)
                graph.setdefault(other, set())
    return graph


def test_no_module_imports_in_a_circle() -> None:
    graph = imports()
    assert len(graph) > 100
    assert circle(graph) == []


def test_every_folder_is_drawn() -> None:
    assert set(drawn()) == set(folder_imports())


def test_imports_follow_the_arrows() -> None:
    """Each import goes along arrows, one or several; so none goes against one."""
    allowed = reachable(drawn())
    against = [
        f"{folder} -> {other}"
        for folder, others in folder_imports().items()
        for other in others
        if (folder, other) not in allowed
    ]
    assert against == []


def test_every_arrow_is_an_import() -> None:
    found = folder_imports()
    idle = [(one, other) for one, others in drawn().items() for other in others if other not in found[one]]
    assert idle == []


def test_the_drawing_has_no_circle() -> None:
    assert circle(drawn()) == []


@pytest.mark.parametrize(
    ("arrows", "names"),
    [({"a": {"b"}, "b": {"a"}}, {"a", "b"}), ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, {"b", "c"})],
)
def test_a_circle_would_be_found(arrows: Graph, names: set[str]) -> None:
    assert set(circle(arrows)) == names


def guest_calls() -> Graph:
    """Return which file of vfud-load uses what another one defines; comments and texts are no use."""
    no_code = re.compile(r"""/\*.*?\*/|'(?:\\.|[^'\\])'|"(?:\\.|[^"\\])*\"""", re.DOTALL)
    sources = {
        path.stem: no_code.sub("", path.read_text())
        for path in sorted((native_dir() / "guest" / "vfud-load").glob("*.c"))
    }
    definition = re.compile(r"^(?!static\b|typedef\b|enum\b)[a-z][\w *]*?\b(\w+)\([^;{]*\)\n\{", re.MULTILINE)
    variable = re.compile(r"^(?:struct \w+|size_t) (\w+)(?:\[\w+\])?;", re.MULTILINE)
    home = {
        name: stem
        for stem, text in sources.items()
        for pattern in (definition, variable)
        for name in pattern.findall(text)
    }
    assert {"reply", "devices", "run_load", "crc32"} <= home.keys()
    return {
        stem: {home[word] for word in set(re.findall(r"\b\w+\b", text)) if home.get(word, stem) != stem}
        for stem, text in sources.items()
    }


def test_the_guests_program_has_no_circle() -> None:
    """Neither of calls nor of headers, and what a file defines is in its own header."""
    calls = guest_calls()
    assert circle(calls) == []
    folder = native_dir() / "guest" / "vfud-load"
    included = {
        path.name: set(re.findall(r'#include "(\w+\.h)"', path.read_text())) for path in folder.glob("*.[ch]")
    }
    assert (
        circle({name: {one for one in others if one in included} for name, others in included.items()}) == []
    )
    for stem, others in calls.items():
        missing = {f"{other}.h" for other in others} - included[f"{stem}.c"]
        indirect = {one for header in included[f"{stem}.c"] for one in included.get(header, ())}
        assert missing <= indirect, f"{stem}.c uses what {missing} declare"


def test_no_module_has_more_than_400_lines() -> None:
    """Ours in Python, and in C what is not made to go into another project's tree."""
    root = PACKAGE.parent
    sources = list(PACKAGE.rglob("*.py"))
    ours = ("bench", "fuzz", "guest", "kernels", "vfio-preload")
    sources += [path for name in ours for path in (native_dir() / name).rglob("*.[ch]")]
    assert len(sources) > 250
    long = {path.relative_to(root).as_posix() for path in sources if path.read_text().count("\n") > 400}
    assert long == set()


# What a plain server does without, from its command to its socket. Each was once part of its start.
NOT_SERVED = (
    "vfu_dev.replay",
    "vfu_dev.profile",  # a profile's classes, without --profile
    "vfu_dev.client",
    "vfu_dev.lab",
    "vfu_dev.metrics",  # without --metrics-port
    "vfu_dev.builds.recipes",
    "vfu_dev.builds.qemu",
    "vfu_dev.builds.guest",
    "vfu_dev.builds.making",
    "vfu_dev.builds.command",
    "subprocess",
    "shutil",
    "importlib.metadata",
    "tomllib",  # without a file
    "csv",
    "difflib",
    "email",
    "asyncio",
    "matplotlib",
    "jinja2",
)


def test_a_server_loads_only_what_it_uses(tmp_path: Path) -> None:
    """A real one, which lists what it has loaded when clients can connect.

    It need not ask the compiler, which loads more: that happens once, or each time where `cc` is ccache.
    """
    program = (
        "import sys\nfrom vfu_dev.builds import compiler\nfrom vfu_dev.cli import main\n"
        "from vfu_dev.server import Server\n"
        f"compiler._ask = lambda: {compiler_version()!r}\n"
        "Server.run = lambda self, on_ready: print(*sys.modules)\n"
        f"main(['serve', '--socket', {str(tmp_path / 's')!r}, '--memory', '64K'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert all(find_spec(name) for name in NOT_SERVED if name.startswith("vfu_dev")), "a new name?"
    assert {"vfu_dev.server.server", "vfu_dev.device.reference.dma"} <= loaded
    assert [name for name in loaded if name.startswith(NOT_SERVED)] == []


# Says whether the collector runs: before the server is ready, after, and when each command has ended.
COLLECTS = """
import gc, sys
from vfu_dev.cli import main
from vfu_dev.server import Server
def run(self, on_ready):
    before = gc.isenabled()
    on_ready()
    print(before, gc.isenabled())
Server.run = run
for argv in (["serve", "--socket", sys.argv[1], "--memory", "64K"], ["serve", "--memory", "much"]):
    try:
        main(argv)
    except SystemExit as end:
        print(end.code, gc.isenabled())
"""


def test_who_looks_at_the_commands_goes_on_collecting_garbage() -> None:
    """As the manual pages do, and completion: the context of those may never be closed."""
    assert gc.isenabled()
    assert cli.get_command(click.Context(cli), "serve") is not None
    assert gc.isenabled()


def test_a_server_collects_garbage_from_when_it_serves(tmp_path: Path) -> None:
    """What it loads before that stays, and a command line that is refused changes nothing."""
    command = [sys.executable, "-c", COLLECTS, str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("serving ")]
    assert lines == ["False True", "0 True", "2 True"]
