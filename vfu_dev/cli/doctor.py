"""`vfu-dev doctor`: what is installed here, what it can do, and how to get what is missing."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import click

from vfu_dev import __version__
from vfu_dev.builds import BuildError, Cache, firmware_dirs, read_manifest, recipe_named
from vfu_dev.builds.making import damage
from vfu_dev.builds.packages import install_command, missing
from vfu_dev.builds.prebuilt import CARRIED, prebuilt
from vfu_dev.builds.recipes import RECIPES
from vfu_dev.cli import EXIT_FAILED, doctor_qemu
from vfu_dev.cli.extras import LAB, install_line
from vfu_dev.cli.findings import Findings
from vfu_dev.cli.output import announced, json_option, show_or_write
from vfu_dev.cli.shape import Command
from vfu_dev.libvfio_user import describe
from vfu_dev.logs import SlowWork
from vfu_dev.sizes import format_size

# What the main job imports; the second value is the extra of this package that brings it.
_PYTHON_PACKAGES = {
    "numpy": "",
    "xxhash": "",
    "click": "",
    "rich": "",
    "qemu.qmp": LAB,
    "matplotlib": LAB,
    "jinja2": LAB,
    "scipy": LAB,
}

_KVM_GET_API_VERSION = 0xAE00  # <linux/kvm.h>


@click.command(
    cls=Command,
    help="Say what is installed here and what it can do. Exit status 0 when the main job can run.",
    examples=["vfu-dev doctor", "vfu-dev doctor --json | jq .problems"],
)
@json_option("Write everything found as JSON", any_word=False)
@click.option("--try-kvm", is_flag=True, help="Start the guest's kernel under KVM; takes up to 10 s.")
@click.option(
    "--verify", is_flag=True, help="Read every file in the cache and compare it with what was built."
)
def command(json_path: str | None, try_kvm: bool, verify: bool) -> None:
    """Look at everything that the main job uses."""
    findings = Findings()
    for examine in (
        _python,
        _carried,
        _library,
        _kernels,
        doctor_qemu.examine,
        _guest,
        _firmware,
        _kvm,
        _build_packages,
        _cache,
    ):
        examine(findings)
    if try_kvm:
        with announced("starting Linux under KVM, for 10 s at most"):
            doctor_qemu.try_kvm(findings)
    if verify:
        _verify(findings)
    result = {"ok": not findings.problems, **findings.facts, "problems": findings.problems}
    show_or_write(result, json_path, lambda: _text(findings))
    if not result["ok"]:
        sys.exit(EXIT_FAILED)


def _python(findings: Findings) -> None:
    versions: dict[str, str | None] = {}
    for name, extra in _PYTHON_PACKAGES.items():
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
            fix = install_line() if extra == LAB else f"pip install {name}"
            findings.problem(f"the Python package {name} is missing", fix)
    findings.facts["vfu_dev"] = __version__
    findings.facts["python"] = {"version": platform.python_version(), "packages": versions}


def _carried(findings: Findings) -> None:
    """List the artifacts that came with the wheel; those need no build."""
    manifests = [read_manifest(folder) for name in CARRIED if (folder := prebuilt(name)) is not None]
    findings.facts["carried"] = [{key: one[key] for key in ("name", "key", "built")} for one in manifests]


def _library(findings: Findings) -> None:
    recipe = recipe_named("libvfio-user")
    try:
        path = recipe.find(Cache())
    except BuildError as error:
        findings.unbuilt(recipe.name, error)
        findings.facts["library"] = {"path": None}
        return
    found = describe(path)
    findings.facts["library"] = found
    if not found["ok"]:
        findings.problem(f"{path}: {found['error']}", f"unset {recipe.override}; vfu-dev build {recipe.name}")


def _kernels(findings: Findings) -> None:
    try:
        path = str(recipe_named("vfu-kernels").find(Cache()))
    except BuildError as error:
        findings.unbuilt("vfu-kernels", error)
        path = None
    findings.facts["kernels"] = {"path": path}


def _guest(findings: Findings) -> None:
    found: dict[str, str | None] = {"path": None}
    try:
        path = recipe_named("guest").find(Cache())
        base = read_manifest(recipe_named("guest-base").folder(Cache())).get("facts")
        kernel = base.get("kernel") if isinstance(base, dict) else None
        found = {"path": str(path), "kernel": kernel}
    except BuildError as error:
        findings.unbuilt("guest", error)
    findings.facts["guest"] = found


def _firmware(findings: Findings) -> None:
    findings.facts["firmware"] = [str(folder) for folder in firmware_dirs()]
    if packages := missing(["run"]):
        findings.problem(f"firmware is missing: {', '.join(packages)}", install_command(packages))


def _kvm(findings: Findings) -> None:
    """Look for KVM. Without it the lab emulates, as it does by default: KVM may answer but not boot."""
    device = Path("/dev/kvm")
    note = "no /dev/kvm"
    usable = False
    if device.exists():
        try:
            fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            note = f"/dev/kvm cannot be opened: {error.strerror}"
        else:
            try:
                note = f"/dev/kvm answers (API {fcntl.ioctl(fd, _KVM_GET_API_VERSION)}); no guest was tried"
                usable = True
            except OSError as error:
                note = f"/dev/kvm does not answer: {error.strerror}"
            finally:
                os.close(fd)
    findings.facts["kvm"] = {"answers": usable, "note": note}


def _build_packages(findings: Findings) -> None:
    """Check what a build needs. What is missing is a problem only while an artifact has to be built."""
    packages = missing(["libvfio-user", "vfu-kernels", "qemu", "guest"])
    findings.facts["build_packages_missing"] = packages
    if packages and findings.problems:
        findings.problem(f"to build, these are missing: {', '.join(packages)}", install_command(packages))


def _cache(findings: Findings) -> None:
    cache = Cache()
    findings.facts["cache"] = {"path": str(cache.root), "bytes": cache.sizes()}


def _verify(findings: Findings) -> None:
    """Compare each artifact with its manifest: nothing else notices a byte that flipped on disk."""
    cache = Cache()
    whole = []
    folders = {name: recipe.folder(cache) for name, recipe in RECIPES.items()}
    there = {name: folder for name, folder in folders.items() if folder.is_dir()}
    work = SlowWork("reading the cache", len(there), lambda text: click.echo(text, err=True))
    for name, folder in there.items():
        if differences := damage(folder):
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            what = f"{folder}: {'; '.join(differences[:3])}{more}"
            findings.problem(what, f"vfu-dev build --again {name}")
        else:
            whole.append(name)
        work.add(1)
    findings.facts["verified"] = whole


def _text(findings: Findings) -> str:
    facts = findings.facts
    packages = facts["python"]["packages"]
    lines = [
        f"vfu-dev {facts['vfu_dev']}, Python {facts['python']['version']}",
        "packages   " + ", ".join(f"{name} {version or 'MISSING'}" for name, version in packages.items()),
        f"carried    {', '.join(one['name'] for one in facts['carried']) or 'nothing by this installation'}",
        f"library    {facts['library']['path'] or 'not built'}",
    ]
    if facts["library"].get("ok"):
        flags = ", ".join(
            flag.removeprefix("VFIO_MIGRATION_") for flag in facts["library"]["migration_flags"]
        )
        lines.append(f"           migrates with {flags}")
        lines += [f"           lacks {what}" for what in facts["library"]["missing"]]
    lines += doctor_qemu.lines(facts)
    kernel = facts["guest"].get("kernel")
    lines.append(f"guest      {facts['guest']['path'] or 'not built'}{f', Linux {kernel}' if kernel else ''}")
    lines.append(f"firmware   {', '.join(facts['firmware']) or 'none'}")
    lines.append(f"KVM        {facts['kvm']['note']}; the lab emulates (TCG) unless asked for KVM")
    missing_packages = facts["build_packages_missing"]
    lines.append(f"to build   {', '.join(missing_packages) or 'nothing'} missing")
    sizes = facts["cache"]["bytes"]
    detail = ", ".join(f"{name} {format_size(count)}" for name, count in sizes.items() if count >= 1 << 20)
    total = format_size(sum(sizes.values()))
    lines.append(f"cache      {facts['cache']['path']}: {total}{f' ({detail})' if detail else ''}")
    if "verified" in facts:
        lines.append(f"           as built: {', '.join(facts['verified']) or 'nothing'}")
    if findings.problems:
        lines.append("")
        for problem in findings.problems:
            lines.append(f"problem: {problem['what']}\n  to do: {problem['fix']}")
    else:
        lines.append("\nready: vfu-dev lab migrate")
    return "\n".join(lines)
