"""`vfu-dev doctor`: what is installed here, what it can do, and what to do about what is missing."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from vfu_dev import __version__
from vfu_dev.builds import BuildError, Cache, NotBuiltError, firmware_dirs, read_manifest, recipe_named
from vfu_dev.builds.packages import install_command, missing
from vfu_dev.libvfio_user import describe
from vfu_dev.sizes import format_size

# What the main job imports; the second value is the extra of this package that brings it.
_PYTHON_PACKAGES = {
    "numpy": "",
    "xxhash": "",
    "click": "",
    "rich": "",
    "qemu.qmp": "lab",
    "matplotlib": "lab",
    "jinja2": "lab",
}
_PROBE_SECONDS = 20.0

_KVM_GET_API_VERSION = 0xAE00  # <linux/kvm.h>

# What a QEMU can do with our device, worst first.
_NOTHING, _ATTACH, _MIGRATE = "nothing", "attach", "migrate"
_ABILITIES = {
    _NOTHING: "does not know vfio-user-pci (QEMU has it since 10.1)",
    _ATTACH: "attaches the device and uses it; cannot migrate it (no enable-migration property)",
    _MIGRATE: "attaches and migrates the device",
}

Facts = dict[str, Any]


class _Findings:
    """Collects facts for --json and problems with their remedies."""

    def __init__(self) -> None:
        self.facts: Facts = {}
        self.problems: list[dict[str, str]] = []

    def problem(self, what: str, fix: str) -> None:
        self.problems.append({"what": what, "fix": fix})

    def unbuilt(self, name: str, error: BuildError) -> None:
        what = f"{name} is not built" if isinstance(error, NotBuiltError) else str(error)
        self.problem(what, f"vfu-dev build {name}")


@click.command(help="Say what is installed here and what it can do. Exit status 0 when the main job can run.")
@click.option("--json", "as_json", is_flag=True, help="Print everything found as JSON.")
def command(as_json: bool) -> None:
    """Look at everything that the main job uses."""
    findings = _Findings()
    for look in (_python, _library, _qemu, _guest, _firmware, _kvm, _build_packages, _cache):
        look(findings)
    result = {"ok": not findings.problems, **findings.facts, "problems": findings.problems}
    click.echo(json.dumps(result, indent=2) if as_json else _text(findings))
    sys.exit(0 if result["ok"] else 1)


def _python(findings: _Findings) -> None:
    versions: dict[str, str | None] = {}
    for name, extra in _PYTHON_PACKAGES.items():
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
            wanted = f"vfu-dev[{extra}]" if extra else name
            findings.problem(f"the Python package {name} is missing", f"pip install '{wanted}'")
    findings.facts["vfu_dev"] = __version__
    findings.facts["python"] = {"version": platform.python_version(), "packages": versions}


def _library(findings: _Findings) -> None:
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


def _qemu(findings: _Findings) -> None:
    cache = Cache()
    candidates: dict[Path, str] = {}
    recipe = recipe_named("qemu")
    try:
        candidates[recipe.find(cache)] = recipe.override if recipe.overridden() else "built here"
    except BuildError as error:
        findings.unbuilt(recipe.name, error)
    chosen = next(iter(candidates), None)
    # What else is around is shown for information; the lab does not use it.
    unpatched = recipe_named("qemu-unpatched")
    if unpatched.folder(cache).is_dir():
        candidates.setdefault(unpatched.find(cache), "built here, without our patches")
    if system := shutil.which("qemu-system-x86_64"):
        candidates.setdefault(Path(system), "in PATH, not used")
    found = [_probe_qemu(path, where) for path, where in candidates.items()]
    findings.facts["qemu"] = found
    if chosen is not None and found[0]["can"] != _MIGRATE:
        what = _ABILITIES[found[0]["can"]] if found[0]["version"] else "does not run"
        findings.problem(f"{chosen}: {what}", f"unset {recipe.override}; vfu-dev build qemu")


def _probe_qemu(path: Path, where: str) -> Facts:
    version = _output(path, "--version").partition("\n")[0]
    # Asking for a device's properties starts no machine and needs no firmware.
    properties = _output(path, "-device", "vfio-user-pci,help")
    if "socket=" not in properties:
        can = _NOTHING
    else:
        can = _MIGRATE if "enable-migration=" in properties else _ATTACH
    return {"path": str(path), "from": where, "version": version or None, "can": can}


def _output(*command: str | Path) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def _guest(findings: _Findings) -> None:
    found: Facts = {"path": None}
    try:
        path = recipe_named("guest").find(Cache())
        base = read_manifest(recipe_named("guest-base").folder(Cache())).get("facts")
        kernel = base.get("kernel") if isinstance(base, dict) else None
        found = {"path": str(path), "kernel": kernel}
    except BuildError as error:
        findings.unbuilt("guest", error)
    findings.facts["guest"] = found


def _firmware(findings: _Findings) -> None:
    findings.facts["firmware"] = [str(folder) for folder in firmware_dirs()]
    if packages := missing(["run"]):
        findings.problem(f"firmware is missing: {', '.join(packages)}", install_command(packages))


def _kvm(findings: _Findings) -> None:
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


def _build_packages(findings: _Findings) -> None:
    """What building would need. A problem only while something has yet to be built."""
    packages = missing(["libvfio-user", "qemu", "guest"])
    findings.facts["build_packages_missing"] = packages
    if packages and findings.problems:
        findings.problem(f"to build, these are missing: {', '.join(packages)}", install_command(packages))


def _cache(findings: _Findings) -> None:
    cache = Cache()
    findings.facts["cache"] = {"path": str(cache.root), "bytes": cache.sizes()}


def _text(findings: _Findings) -> str:
    facts = findings.facts
    packages = facts["python"]["packages"]
    lines = [
        f"vfu-dev {facts['vfu_dev']}, Python {facts['python']['version']}",
        "packages   " + ", ".join(f"{name} {version or 'MISSING'}" for name, version in packages.items()),
        f"library    {facts['library']['path'] or 'not built'}",
    ]
    if facts["library"].get("ok"):
        flags = ", ".join(
            flag.removeprefix("VFIO_MIGRATION_") for flag in facts["library"]["migration_flags"]
        )
        lines.append(f"           migrates with {flags}")
        lines += [f"           lacks {what}" for what in facts["library"]["missing"]]
    for one in facts["qemu"]:
        lines.append(f"QEMU       {one['path']} ({one['from']}): {one['version'] or 'does not run'}")
        lines.append(f"           {_ABILITIES[one['can']]}")
    if not facts["qemu"]:
        lines.append("QEMU       none")
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
    if findings.problems:
        lines.append("")
        for problem in findings.problems:
            lines.append(f"problem: {problem['what']}\n  to do: {problem['fix']}")
    else:
        lines.append("\nready: vfu-dev lab migrate")
    return "\n".join(lines)
