"""The command line: help without importing torch, info, errors."""

from __future__ import annotations

import subprocess
import sys

import onepass
import pytest
from onepass.cli import main


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert capsys.readouterr().out == onepass.info() + "\n"


def test_module_runs_as_a_program() -> None:
    child = subprocess.run([sys.executable, "-m", "onepass", "info"], capture_output=True, text=True, check=True)
    assert child.stdout.startswith("onepass ")


@pytest.mark.parametrize(
    "command",
    [[], ["demo"], ["bench"], *(["bench", kind] for kind in ("prefill", "train", "decode", "hybrid", "suite"))],
    ids=" ".join,
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: onepass" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "required: command"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["bench"], "required: benchmark"),
        (["bench", "suite", "--output", "."], "--output: got ., a folder; need a file's name"),
        (["bench", "prefill", "--dtypes", "int8"], "invalid choice: 'int8'"),
        (["demo", "--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_wrong_usage(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
