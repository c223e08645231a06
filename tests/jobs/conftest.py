"""The `ldm` command run inside the test's process."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import cli

Ldm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ldm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Ldm:
    """Run the command in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["ldm", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run
