"""Formats results as lines, JSON, TAP and JUnit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from vfu_dev.conformance.model import Level, Result, Status

_WORDS = {Status.PASS: "ok", Status.FAIL: "FAILED", Status.SKIP: "-"}


def line(result: Result) -> str:
    """Return one result as text; a failure has its sentence of the specification."""
    check = result.check
    word = _WORDS[result.status]
    if result.status is Status.FAIL and check.level is not Level.MUST:
        word = "no"
    text = f"{word:6}  {check.level.value:8}  {check.name}: {check.about}"
    detail = _printable(result.detail)
    if result.status is Status.SKIP:
        return f"{text} [{detail}]"
    if result.status is Status.PASS:
        return text
    source = check.source
    return f"{text}\n{'':18}{detail}\n{'':18}{source.document}, {source.section}: “{source.quote}”"


def counts(results: Sequence[Result]) -> dict[str, dict[str, int]]:
    """Return the number of checks by level and status."""
    found = {level.value: {status.value: 0 for status in Status} for level in Level}
    for result in results:
        found[result.check.level.value][result.status.value] += 1
    return found


def summary(results: Sequence[Result]) -> str:
    """Return the counts as one line."""
    parts = []
    for level, found in counts(results).items():
        done = found["pass"] + found["fail"]
        if done:
            parts.append(f"{level} {found['pass']} of {done}")
    skipped = sum(1 for result in results if result.status is Status.SKIP)
    rest = f"; {skipped} do not apply" if skipped else ""
    return f"{', '.join(parts) or 'nothing was checked'}{rest}"


def as_json(results: Sequence[Result], server: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON object of `--json`."""
    return {
        "kind": "check",
        "ok": not any(result.broken for result in results),
        "server": server,
        "counts": counts(results),
        "checks": [result.as_json() for result in results],
    }


def as_tap(results: Sequence[Result]) -> str:
    """Return TAP version 14. A check that is no must is a TODO test, which a harness does not count."""
    lines = ["TAP version 14", f"1..{len(results)}"]
    for number, result in enumerate(results, 1):
        check = result.check
        good = "not ok" if result.status is Status.FAIL else "ok"
        text = f"{good} {number} - {check.name}: {_escaped(check.about)}"
        if result.status is Status.SKIP:
            text += f" # SKIP {_escaped(result.detail)}"
        elif result.status is Status.FAIL and check.level is not Level.MUST:
            text += f" # TODO {check.level.value}"
        lines.append(text)
        if result.status is Status.FAIL:
            source = check.source
            lines += [
                "  ---",
                f"  message: {_quoted(result.detail)}",
                f"  level: {check.level.value}",
                f"  source: {_quoted(f'{source.document}, {source.section}: {source.quote}')}",
                "  ...",
            ]
    return "\n".join(lines) + "\n"


def as_junit(results: Sequence[Result]) -> str:
    """Return JUnit's XML. A failed check that is no must is a skipped test: JUnit has no better status."""
    root = ElementTree.Element("testsuites", name="vfu-dev check")
    groups = dict.fromkeys(result.check.group for result in results)
    for group in groups:
        some = [result for result in results if result.check.group == group]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=group,
            tests=str(len(some)),
            failures=str(sum(result.broken for result in some)),
            errors="0",
            skipped=str(sum(result.status is not Status.PASS and not result.broken for result in some)),
            time=f"{sum(result.seconds for result in some):.3f}",
        )
        for result in some:
            _junit_case(suite, result)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _junit_case(suite: ElementTree.Element, result: Result) -> None:
    check = result.check
    case = ElementTree.SubElement(
        suite, "testcase", classname=f"vfio-user.{check.group}", name=check.name, time=f"{result.seconds:.3f}"
    )
    detail = _printable(result.detail)
    if result.broken:
        failure = ElementTree.SubElement(case, "failure", message=detail, type=check.level.value)
        failure.text = f"{check.source.document}, {check.source.section}: {check.source.quote}"
    elif result.status is Status.FAIL:
        ElementTree.SubElement(case, "skipped", message=f"{check.level.value}: {detail}")
    elif result.status is Status.SKIP:
        ElementTree.SubElement(case, "skipped", message=detail)


def _printable(text: str) -> str:
    """Return `text` without characters that XML forbids; the server may have sent some."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _escaped(text: str) -> str:
    """Return `text` as a TAP description, in which # would begin a directive."""
    return _printable(text).replace("\\", "\\\\").replace("#", "\\#")


def _quoted(text: str) -> str:
    """Return `text` as a double-quoted YAML scalar."""
    return '"' + _printable(text).replace("\\", "\\\\").replace('"', '\\"') + '"'
