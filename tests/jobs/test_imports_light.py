"""The command line and its recipes are at hand without the seconds that importing torch takes."""

import subprocess
import sys
from pathlib import Path

import jobs

SCRIPT = """
import sys
from pathlib import Path

import jobs.cli, jobs.commands.plan, jobs.commands.run, pipelines.run.walk
from pipelines.run.recipe import load_recipe

for path in sys.argv[1:]:
    recipe = load_recipe(Path(path), ("pairs.source=metadata.jsonl",))
    assert recipe.diffusion is None or recipe.diffusion.unet.in_channels == recipe.autoencoder.model.embed_dim
assert "torch" not in sys.modules, "torch was imported"
"""


def test_commands_and_shipped_recipes_load_without_torch() -> None:
    recipes = sorted(Path(jobs.__file__).parent.glob("recipes/*.yaml"))
    assert recipes
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, recipes)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
