"""The part of `vfu-dev doctor` about QEMUs: which are installed, and what each can do with the device."""

from __future__ import annotations

from pathlib import Path

from vfu_dev.builds import BuildError, Cache, NotBuiltError, recipe_named
from vfu_dev.builds.qemu_binary import NAMES, VFIO_PCI, VFIO_USER_PCI, QemuBinary, find_qemu, probe_qemu
from vfu_dev.cli.findings import Facts, Findings
from vfu_dev.errors import VfuDevError
from vfu_dev.vm import kvm_trial

# What a QEMU can do through vfio-user-pci, worst first; the key is in --json.
_NOTHING, _ATTACH, _MIGRATE = "nothing", "attach", "migrate"
_ABILITIES = {
    _NOTHING: "not in it (QEMU has it since 10.1)",
    _ATTACH: "attaches the device and uses it; cannot migrate it (no enable-migration property)",
    _MIGRATE: "attaches and migrates the device",
}
_FROM = {
    "patched": "built here",
    "unpatched": "built here, without our patches",
    "system": "in PATH",
}


def examine(findings: Findings) -> None:
    """Find the QEMU that the lab uses, and the others that can be named."""
    recipe = recipe_named("qemu")
    found: dict[Path, Facts] = {}
    try:
        path = recipe.find(Cache())
        found[path] = _describe(path, recipe.override if recipe.overridden() else _FROM["patched"])
    except BuildError as error:
        findings.unbuilt(recipe.name, error)
    chosen = next(iter(found.values()), None)
    absent: dict[str, str] = {}
    for name in NAMES:
        try:
            binary = find_qemu(name)
            found.setdefault(binary.path, _facts(binary, _FROM.get(name, f"Debian's, {name}")))
        except NotBuiltError as error:
            if name != "patched":
                absent[name] = f"vfu-dev build {error.name}"
        except BuildError as error:
            if name != "system":
                absent[name] = str(error)
    findings.facts["qemu"] = list(found.values())
    findings.facts["qemu_absent"] = absent
    if chosen is not None and chosen["can"] != _MIGRATE:
        can = f"{chosen['path']}: {VFIO_USER_PCI}: {_ABILITIES[chosen['can']]}"
        findings.problem(
            can if chosen["version"] else chosen["error"], f"unset {recipe.override}; vfu-dev build qemu"
        )


def _describe(path: Path, where: str) -> Facts:
    try:
        return _facts(probe_qemu(path), where)
    except BuildError as error:
        return {"path": str(path), "from": where, "version": None, "can": _NOTHING, "error": str(error)}


def _facts(binary: QemuBinary, where: str) -> Facts:
    migrates = binary.front_ends.get(VFIO_USER_PCI)
    return {
        "path": str(binary.path),
        "from": where,
        "version": binary.version,
        "can": _NOTHING if migrates is None else _MIGRATE if migrates else _ATTACH,
        "front_ends": {
            name: {"migrates": migrates, "problem": binary.problem(name) or None}
            for name, migrates in binary.front_ends.items()
        },
        "iommu_paths": list(binary.iommu_paths),
        "qtest": binary.qtest,
    }


def try_kvm(findings: Findings) -> None:
    """Start the guest's kernel under KVM with the QEMU that the lab uses, and add to the facts what came."""
    kvm = findings.facts["kvm"]
    kvm["guest_runs"] = None
    if not kvm["answers"]:
        return
    try:
        binary = probe_qemu(recipe_named("qemu").find(Cache()))
        trial = kvm_trial.try_kvm(binary, recipe_named("guest").find(Cache()))
    except VfuDevError as error:
        kvm["note"] = f"{kvm['note']}: {error}"
        return
    kvm["guest_runs"], kvm["seconds"] = trial.runs, round(trial.seconds, 2)
    answers = kvm["note"].partition(";")[0]
    if trial.runs:
        kvm["note"] = f"{answers}; Linux started under it in {trial.seconds:.1f} s: --accel kvm works here"
    else:
        kvm["note"] = f"{answers}, but Linux prints nothing under it in {trial.seconds:.0f} s"
        if errors := [line for line in trial.said.splitlines() if "warning:" not in line]:
            kvm["note"] += f" ({errors[-1]})"


def lines(facts: Facts) -> list[str]:
    """Return what is printed about the QEMUs that `examine` found."""
    printed = []
    for one in facts["qemu"]:
        printed.append(f"QEMU       {one['path']} ({one['from']}): {one['version'] or 'does not run'}")
        if not one["version"]:
            continue
        printed.append(f"           {VFIO_USER_PCI}: {_ABILITIES[one['can']]}")
        printed.append(f"           {VFIO_PCI}: {_vfio_pci(one)}")
        if not one["qtest"]:
            printed.append("           no qtest accelerator: not for lab --guest none")
    printed += [f"QEMU       {name}: not here ({what})" for name, what in facts["qemu_absent"].items()]
    return printed or ["QEMU       none"]


def _vfio_pci(one: Facts) -> str:
    front_end = one["front_ends"].get(VFIO_PCI)
    if front_end is None:
        return "not in it"
    if front_end["problem"]:
        return f"{front_end['problem']}"
    does = "attaches and migrates the device" if front_end["migrates"] else "attaches the device"
    return f"{does} (preloaded; IOMMU paths {', '.join(one['iommu_paths'])})"
