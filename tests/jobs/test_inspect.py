"""`ldm inspect` as a command."""

import json
from pathlib import Path

from PIL import Image

from pipelines.store.ledger import Ledger
from pipelines.store.manifest import MANIFEST
from pipelines.store.storage import Storage
from tests.aged import aged
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


def test_of_a_root_the_pictures_are_those_of_the_pairs_that_were_finished_last(ldm: Ldm, tmp_path: Path) -> None:
    root = tmp_path / "root"
    Ledger(Storage(str(root))).mark_version()
    pairs_artifact(root, name="new", rows=(3,))
    old = pairs_artifact(root, name="old", rows=(60,))
    aged(Path(old.storage.path(MANIFEST)))
    assert ldm("inspect", str(root), "--contact-sheet", "sheet.png")[0] == 0
    assert ldm("inspect", str(root / "pairs" / "new"), "--contact-sheet", "new.png")[0] == 0
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "new.png").read_bytes()
