"""Each kept input is harmless, a fixed amount of fuzzing finds nothing, and planted faults are found."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fuzzkit
import pytest
from fuzzkit import PYTHON_TARGETS, TARGETS

from vfu_dev.errors import BuildError

# About five seconds each on an idle processor.
EXECUTIONS = {
    "server": 4000,
    "migration": 12000,
    "dma-log": 10000,
    "preload": 800,
    "stream": 1200,
    "client": 6000,
}


@pytest.fixture(autouse=True)
def built(request: pytest.FixtureRequest) -> None:
    """Have the target there, or skip what needs it."""
    if "target" in request.fixturenames and request.getfixturevalue("target") in PYTHON_TARGETS:
        if importlib.util.find_spec("atheris") is None:
            pytest.skip("atheris is not installed")
        return
    try:
        fuzzkit.artifact("fuzz-targets", build=True)
    except BuildError as error:
        pytest.skip(str(error))


def corpus(target: str) -> list[Path]:
    return sorted(fuzzkit.corpus_of(target).iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_every_kept_input_is_harmless(target: str) -> None:
    inputs = corpus(target)
    assert len(inputs) >= 5
    run = fuzzkit.replay(target, inputs)
    assert run.status == 0, run.text
    assert run.executions >= len(inputs), run.text


@pytest.mark.parametrize("target", TARGETS)
def test_fuzzing_finds_nothing(target: str, tmp_path: Path) -> None:
    """The same inputs each time: a seed and a number, no time."""
    found, grown = tmp_path / "found", tmp_path / "corpus"
    found.mkdir()
    grown.mkdir()
    run = fuzzkit.run(
        target,
        "-seed=1",
        f"-runs={EXECUTIONS[target]}",
        f"-max_len={fuzzkit.MAX_INPUT_BYTES}",
        f"-artifact_prefix={found}/",
        grown,
        fuzzkit.corpus_of(target),
    )
    kept = {path.name: path.read_bytes().hex() for path in found.iterdir()}
    assert run.status == 0, f"{run.text}\n{kept}"
    assert run.executions >= EXECUTIONS[target]
    assert run.edges > 100, "nothing of the code under test is instrumented"


@pytest.mark.parametrize("target", TARGETS)
def test_a_planted_fault_is_found(target: str) -> None:
    """A target that notices nothing would pass the other tests as well; the corpus alone has to reach it."""
    run = fuzzkit.replay(target, corpus(target), planted=True)
    assert run.status != 0
    assert re.search(r"FAULT:|ERROR: AddressSanitizer|runtime error:|Uncaught Python exception", run.text), (
        run.text
    )


def test_make_fuzz_keeps_what_it_finds_and_shows_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command behind `make fuzz`, with a planted fault: a finding, status 1, and the way back to it."""
    plain = fuzzkit.command_of
    monkeypatch.setattr(fuzzkit, "command_of", lambda target, planted=False: plain(target, planted=True))
    import fuzz

    summary = tmp_path / "summary.json"
    options = [
        "run",
        "--target",
        "migration",
        "--seconds",
        "6",
        "--out",
        str(tmp_path),
        "--json",
        str(summary),
    ]
    monkeypatch.setattr(sys, "argv", ["fuzz.py", *options])
    assert fuzz.main() == 1
    (result,) = json.loads(summary.read_text())["targets"]
    found = list((tmp_path / "findings" / "migration").iterdir())
    assert result["target"] == "migration"
    assert result["findings"] == len(found) >= 1
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "repro", str(found[0])])
    assert fuzz.main() == 1
    monkeypatch.setattr(fuzzkit, "command_of", plain)
    assert fuzz.main() == 0


@pytest.mark.usefixtures("library")
def test_the_first_inputs_of_every_target_can_be_made_again(tmp_path: Path) -> None:
    """As `make fuzz-corpus` does, without pytest's path: what our client says today, and streams of today."""
    code = f"import sys; sys.path[0] = {str(fuzzkit.FOLDER)!r}\n"
    code += f"import fuzz, pathlib; fuzz.write_first_inputs(pathlib.Path({str(tmp_path)!r}))"
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=bare, check=False)
    assert done.returncode == 0, done.stderr
    for target in TARGETS:
        assert any(path.stat().st_size for path in (tmp_path / target).iterdir()), target


def test_a_file_of_no_target_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "crash"
    path.write_bytes(b"x")
    command = [sys.executable, str(fuzzkit.FOLDER / "fuzz.py"), "repro", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=fuzzkit.environment())
    assert done.returncode == 1
    assert "--target is one of" in done.stderr
