"""The `ldm` command: what it refuses, in one line and with the right exit code, and what it leaves alone."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cli
from tests.tiny import tiny_recipe, write_pictures, write_recipe

Ldm = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", 24)


@pytest.fixture
def recipe(tmp_path: Path, table: Path) -> Path:
    return write_recipe(tmp_path / "tiny.yaml", tiny_recipe(table))


def one_line(err: str) -> str:
    """Return the error as people see it: the last line, with the command's name first, and no traceback anywhere."""
    assert "Traceback" not in err
    assert err.rstrip().splitlines()[-1].startswith("ldm: ")
    assert err.count("ldm: ") == 1, err
    return err.rstrip().splitlines()[-1]


def test_every_command_has_help_with_an_example(ldm: Ldm) -> None:
    code, out, _ = ldm("--help")
    assert code == 0
    for name in cli.COMMANDS:
        assert name in out
        code, text, _ = ldm(name, "--help")
        assert code == 0
        assert f"ldm {name}" in text.split("Example:")[1], name


def test_an_unknown_command_or_option_is_misuse(ldm: Ldm, recipe: Path) -> None:
    assert ldm("frobnicate")[0] == 2
    assert ldm("run", recipe, "--frobnicate")[0] == 2
    code, _, err = ldm("run", recipe, "--only", "latent")
    assert code == 2
    assert "latents" in one_line(err)


def test_an_unknown_recipe_key_is_misuse_and_the_nearest_is_suggested(ldm: Ldm, recipe: Path) -> None:
    code, _, err = ldm("run", recipe, "--set", "pairs.image_sise=64")
    assert code == 2
    assert "unknown key 'pairs.image_sise'; did you mean 'image_size'" in one_line(err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "latents", "--from", "pairs"), "--only names one stage"),
        (("--from", "export", "--to", "pairs"), "--from export comes after --to pairs"),
        (("--only", "pairs", "--force", "latents"), "--force latents is outside the stages selected"),
    ],
)
def test_a_selection_that_makes_no_sense_is_misuse(ldm: Ldm, recipe: Path, options: tuple[str], message: str) -> None:
    code, _, err = ldm("run", recipe, *options)
    assert code == 2
    assert message in one_line(err)


def test_a_stage_alone_is_checked_against_what_it_needs(ldm: Ldm, table: Path) -> None:
    options = ("--set", f"pairs.source={table}", "--set", "pairs.columns.image=file", "--set", "pairs.image_size=256")
    code, out, _ = ldm("plan", "small", "--only", "pairs", *options, "--json")
    states = [stage["state"] for stage in json.loads(out.splitlines()[-1])["stages"]]
    assert (code, states) == (0, ["run"] + ["skipped"] * 5)
    code, _, err = ldm("plan", "small", *options)
    assert code == 2
    assert "pairs.image_size must be diffusion.unet.latent_size x" in one_line(err)


def test_the_recipe_of_pairs_alone_plans_one_stage(ldm: Ldm, table: Path) -> None:
    options = ("--set", f"pairs.source={table}", "--set", "pairs.columns.image=file")
    code, out, _ = ldm("plan", "pairs", *options, "--json")
    assert code == 0
    assert [(stage["name"], stage["rows"]) for stage in json.loads(out.splitlines()[-1])["stages"]] == [("pairs", 24)]
    code, _, err = ldm("run", "pairs", *options, "--only", "diffusion")
    assert code == 2
    assert "recipe pairs has no stage diffusion" in one_line(err)


def test_a_missing_source_is_one_line(ldm: Ldm, recipe: Path) -> None:
    code, _, err = ldm("plan", recipe, "--set", "pairs.source=nowhere/metadata.jsonl")
    assert code == 1
    assert "nowhere/metadata.jsonl" in one_line(err)


def test_an_unreadable_parquet_is_one_line(ldm: Ldm, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is not a table PAR1")
    code, _, err = ldm("plan", recipe, "--set", f"pairs.source={tmp_path}/bad.parquet")
    assert code == 1
    assert "bad.parquet" in one_line(err)


def test_a_table_without_a_text_column_is_one_line_that_lists_its_columns(ldm: Ldm, tmp_path: Path) -> None:
    pq.write_table(pa.table({"URL": ["http://a.example/x.jpg"], "words": ["a"]}), tmp_path / "t.parquet")
    recipe = tiny_recipe(tmp_path / "t.parquet")
    recipe["pairs"].pop("columns")
    code, _, err = ldm("run", write_recipe(tmp_path / "r.yaml", recipe), "--root", tmp_path / "root")
    assert code == 1
    assert "words" in one_line(err)
    assert "pairs.columns.text" in one_line(err)


def test_a_root_that_cannot_be_written_is_one_line(ldm: Ldm, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for root in (tmp_path / "file" / "root", Path("/proc/nowhere")):
        code, _, err = ldm("run", recipe, "--root", root)
        assert code == 1
        assert f"cannot write to root {root}" in one_line(err)


def test_only_refuses_to_run_without_what_it_reads(ldm: Ldm, recipe: Path, tmp_path: Path) -> None:
    code, _, err = ldm("run", recipe, "--root", tmp_path / "root", "--only", "latents")
    assert code == 1
    assert "latents needs pairs, which is not finished" in one_line(err)


def test_an_artifact_that_another_run_makes_is_refused_with_its_holder(ldm: Ldm, recipe: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    _, out, _ = ldm("plan", recipe, "--root", root, "--json")
    lock = root / ".locks" / f"pairs-{json.loads(out)['stages'][0]['key']}" / ".lock"
    lock.parent.mkdir(parents=True)
    holder = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    holder += """f.write('{"holder": "pid 4242 on elsewhere", "progress": {}}'); f.flush(); """
    holder += "print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", holder, lock], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        code, _, err = ldm("run", recipe, "--root", root, "--no-wait")
    finally:
        process.kill()
        process.wait()
    assert code == 1
    assert "is in use by pid 4242 on elsewhere" in one_line(err)


def test_an_occupied_port_is_one_line(ldm: Ldm, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, err = ldm("ui", tmp_path, "--port", port)
        assert code == 1
        assert f"port {port} on 127.0.0.1 cannot be used" in one_line(err)
        code, _, err = ldm("demo", "--root", tmp_path / "demo", "--pictures", 50, "--port", port)
        assert code == 1
        assert str(port) in one_line(err)


def test_no_cluster_at_the_address_is_one_line(ldm: Ldm, recipe: Path) -> None:
    for arguments in (("submit", recipe, "--root", "/shared/root"), ("jobs",), ("logs", "x"), ("stop", "x")):
        code, _, err = ldm(*arguments, "--address", "http://127.0.0.1:9")
        assert code == 1
        assert "no Ray cluster takes jobs at http://127.0.0.1:9" in one_line(err)


def test_submit_refuses_a_root_that_would_be_gone_with_the_job(ldm: Ldm, recipe: Path) -> None:
    code, _, err = ldm("submit", recipe, "--root", "runs/here")
    assert code == 2
    assert "root runs/here is relative" in one_line(err)


def test_a_root_inside_the_source_is_misuse(ldm: Ldm, recipe: Path, table: Path) -> None:
    code, _, err = ldm("plan", recipe, "--set", f"pairs.source={table.parent}", "--root", table.parent / "out")
    assert code == 2
    assert "must not lie inside pairs.source" in one_line(err)


def test_sample_inspect_verify_and_export_refuse_what_is_not_there(ldm: Ldm, tmp_path: Path) -> None:
    for arguments in (
        ("sample", "nowhere", "a cat"),
        ("inspect", "nowhere"),
        ("verify", "nowhere"),
        ("export", "nowhere", "out"),
    ):
        code, _, err = ldm(*arguments)
        assert code == 1
        assert "nowhere" in one_line(err)


def test_an_eta_for_a_sampler_without_one_is_misuse(ldm: Ldm) -> None:
    code, _, err = ldm("sample", "nowhere", "a cat", "--sampler", "unipc", "--eta", "0.5")
    assert code == 2
    assert "--eta 0.5 with --sampler unipc" in one_line(err)


def test_plan_says_what_would_run_without_running_it(ldm: Ldm, recipe: Path, tmp_path: Path) -> None:
    code, out, _ = ldm("plan", recipe, "--root", tmp_path / "root", "--json")
    assert code == 0
    stages = json.loads(out.splitlines()[-1])["stages"]
    assert [stage["state"] for stage in stages] == ["run"] * 6
    assert stages[0]["rows"] == 24
    assert all(stage["estimated"] for stage in stages)
    assert not (tmp_path / "root").exists()


def test_doctor_says_what_is_there_and_fails_where_nothing_can_be_written(ldm: Ldm, tmp_path: Path) -> None:
    code, out, _ = ldm("doctor", "--root", tmp_path / "root", "--json")
    facts = json.loads(out.splitlines()[-1])
    assert code == 0
    assert facts["healthy"]
    assert facts["packages"]["ray"]
    code, _, err = ldm("doctor", "--root", "/proc/nowhere")
    assert code == 1
    assert "cannot run ldm on /proc/nowhere" in err


@pytest.mark.usefixtures("ray_cluster")
def test_a_full_disk_is_one_line_and_what_is_committed_stays(ldm: Ldm, full_disk: Path, tmp_path: Path) -> None:
    table = write_pictures(tmp_path / "pictures", 96, side=64)
    recipe = tiny_recipe(table)
    recipe["pairs"] |= {"encode": "png", "image_size": 64, "deduplicate": False}
    recipe["diffusion"]["unet"]["latent_size"] = 8
    path = write_recipe(tmp_path / "full.yaml", recipe | {"tracking": {"enabled": False}})
    code, _, err = ldm("run", path, "--root", full_disk, "--only", "pairs")
    assert "disk full" in one_line(err)
    assert code == 1
    before = {file: file.read_bytes() for file in full_disk.glob("pairs/*/*.tar")}
    assert before, "some shards fit"
    assert not list(full_disk.glob("pairs/*/.*.tmp"))

    subprocess.run(["mount", "-o", "remount,size=64m", full_disk], check=True)
    code, out, err = ldm("run", path, "--root", full_disk, "--only", "pairs", "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["stages"][0]["rows"] == 96
    assert all(file.read_bytes() == data for file, data in before.items())


@pytest.mark.usefixtures("ray_cluster")
def test_a_truncated_shard_is_refused_and_force_heals_it(ldm: Ldm, recipe: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    quiet = ("--root", root, "--set", "tracking.enabled=false")
    assert ldm("run", recipe, *quiet, "--only", "pairs")[0] == 0
    shard = next(root.glob("pairs/*/000000.tar"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1000])

    code, _, err = ldm("run", recipe, *quiet, "--to", "autoencoder")
    assert code == 1
    assert "000000.tar" in one_line(err)
    assert "--force pairs" in one_line(err)
    assert ldm("verify", shard.parent)[0] == 1

    code, _, err = ldm("run", recipe, *quiet, "--only", "pairs", "--force", "pairs")
    assert code == 0, err
    assert shard.read_bytes() == whole
    assert ldm("verify", shard.parent)[0] == 0
    assert [path.name for path in (root / "pairs").iterdir()] == [shard.parent.name]


@pytest.mark.usefixtures("ray_cluster")
def test_a_copied_artifact_of_another_key_is_refused(ldm: Ldm, recipe: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    quiet = ("--root", root, "--set", "tracking.enabled=false")
    assert ldm("run", recipe, *quiet, "--only", "pairs")[0] == 0
    made = next((root / "pairs").iterdir())
    code, out, _ = ldm("plan", recipe, *quiet, "--set", "pairs.quality=80", "--json")
    wanted = json.loads(out.splitlines()[-1])["stages"][0]["key"]
    shutil.copytree(made, root / "pairs" / wanted)
    code, _, err = ldm("run", recipe, *quiet, "--set", "pairs.quality=80", "--only", "pairs")
    assert code == 1
    assert f"says its key is {made.name}, but {wanted} was asked for" in one_line(err)
