"""`ldm inspect` as a command."""

import json
from pathlib import Path

from PIL import Image

from pipelines.store.ledger import Ledger
from pipelines.store.manifest import MANIFEST
from pipelines.store.storage import Storage
from tests.aged import aged
from tests.jobs.conftest import Ldm
from tests.pipelines.stages.latents.inspection.encoded import latents, pictures
from tests.tiny_artifacts import first_stage_artifact, pairs_artifact


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


def test_verify_compares_samples_of_latents_and_says_what_it_found(ldm: Ldm, tmp_path: Path) -> None:
    pairs, first_stage = pictures(tmp_path), first_stage_artifact(tmp_path)
    good = latents(tmp_path, pairs, first_stage)
    code, out, _ = ldm("verify", good.storage.url, "--reencode", "4")
    whole, note = out.replace("\n         ", "\n|").split("\n|")
    assert (code, whole.split()[0]) == (0, "whole")
    assert note.startswith("4 samples decoded and encoded again: PSNR ")
    wrong = latents(tmp_path, pairs, first_stage, name="wrong", change=lambda shard, moments: moments[::-1])
    code, out, err = ldm("verify", wrong.storage.url, "--json")
    (report,) = json.loads(out.splitlines()[-1])["artifacts"]
    assert code == 1
    assert "1 of 1 damaged" in err
    assert report["problems"][0].startswith("000000.tar: sample 000000000 is not what autoencoder autoencoder makes")
    assert report["samples"]["encoded_again"]["largest_difference"] > 0.5
    assert ldm("verify", wrong.storage.url, "--reencode", "0")[0] == 0
