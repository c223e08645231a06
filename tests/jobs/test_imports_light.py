"""`ldm --help`, a recipe and a plan are at hand without the seconds that importing torch or Ray takes."""

import subprocess
import sys
from pathlib import Path

import pytest

import jobs
from tests.tiny import write_pictures

RECIPES = sorted(path.stem for path in Path(jobs.__file__).parent.glob("recipes/*.yaml"))
HEAVY = ("matplotlib", "mlflow", "ray", "torch", "transformers")
RUN = """
import sys
from jobs import cli

sys.argv = ["ldm", *sys.argv[2:]]
try:
    cli.main()
except SystemExit as exit_:
    assert not exit_.code, exit_.code
found = [name for name in {heavy!r} if name in sys.modules]
assert not found, f"imported: {{found}}"
"""


def run(*arguments: str, heavy: tuple[str, ...] = HEAVY) -> subprocess.CompletedProcess[str]:
    """Run `ldm` in a fresh interpreter, which then says what it has imported."""
    command = [sys.executable, "-c", RUN.format(heavy=heavy), "ldm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("plan", "--help"), ("submit", "--help")])
def test_help_is_light(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["ls", "gc"])
def test_help_of_what_looks_at_a_root_does_without_its_libraries(command: str) -> None:
    done = run(command, "--help", heavy=(*HEAVY, "pyarrow", "fsspec"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "demo"])
def test_planning_a_shipped_recipe_is_light(recipe: str, tmp_path: Path) -> None:
    table = write_pictures(tmp_path / "pictures", 4)
    options = (f"pairs.source={table}", "pairs.columns.image=file", "pairs.columns.text=captions")
    done = run(
        "plan", recipe, "--root", str(tmp_path / "root"), *(part for each in options for part in ("--set", each))
    )
    assert done.returncode == 0, done.stderr
    assert "pairs" in done.stdout
