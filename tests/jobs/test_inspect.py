"""`ldm inspect` as a command."""

import json
from pathlib import Path

from PIL import Image

from tests.jobs.conftest import Ldm
from tests.tiny_artifacts import pairs_artifact


def test_the_command_writes_a_contact_sheet_and_says_where(ldm: Ldm, tmp_path: Path) -> None:
    artifact = pairs_artifact(tmp_path, rows=(5, 0, 60))
    code, out, _ = ldm("inspect", artifact.storage.url, "--contact-sheet", "sheet.png", "--json")
    facts = json.loads(out.splitlines()[-1])
    assert (code, facts["contact_sheet"], facts["stage"]) == (0, "sheet.png", "pairs")
    image = Image.open(tmp_path / "sheet.png")
    assert image.width == 8 * 180 + 4
    code, out, _ = ldm("inspect", artifact.storage.path("000000.tar"), "--contact-sheet", "shard.png")
    assert (code, out.splitlines()[-1]) == (0, "contact sheet  shard.png")
