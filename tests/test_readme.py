"""The README's file tree names every module, and none that is not there."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def tree() -> dict[str, str]:
    """Return the phrase of every path in the tree under "What is where"."""
    block = README.split("## What is where")[1].split("```")[1]
    parents: list[str] = []
    phrases = {}
    for line in block.strip("\n").splitlines():
        name, _, phrase = line.strip().partition(" ")
        parents = [*parents[: (len(line) - len(line.lstrip())) // 2], name]
        phrases["".join(parents)] = phrase.strip()
    return phrases


def test_the_file_tree_names_every_module_with_a_phrase() -> None:
    phrases = tree()
    packages = [REPOSITORY / name for name in ("ldm_core", "pipelines", "jobs")]
    modules = {
        path.relative_to(REPOSITORY).as_posix()
        for package in packages
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert {path for path in phrases if path.endswith(".py")} == modules
    assert [path for path, phrase in phrases.items() if not phrase] == []
    assert [path for path in phrases if not (REPOSITORY / path).exists()] == []
