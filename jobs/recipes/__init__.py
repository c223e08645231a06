"""The shipped recipes, found by name."""

import difflib
from pathlib import Path

from pipelines.errors import MisuseError

FOLDER = Path(__file__).parent


def recipe_path(name: str) -> Path:
    """Return a recipe's file, given its path or the name of a shipped recipe.

    Raises:
        MisuseError: it is neither; the message names the nearest shipped recipe.
    """
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    shipped = sorted(file.stem for file in FOLDER.glob("*.yaml"))
    if name in shipped:
        return FOLDER / f"{name}.yaml"
    nearest = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"shipped: {', '.join(shipped)}"
    raise MisuseError(f"no recipe {name!r}: neither a .yaml file nor a shipped recipe; {hint}")
