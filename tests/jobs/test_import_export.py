"""`ldm import` and `ldm export`: there and back, exit codes, one-line errors, and nothing half-written."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import ldm_core
from ldm_core import checkpoint, presets
from ldm_core.checkpoint_formats import compvis
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.networks.autoencoder import build_first_stage
from ldm_core.tokenizers.tokenizer import Tokenizer
from ldm_core.tokenizers.wordpiece import build_vocabulary

Ldm = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    torch.manual_seed(0)
    return presets.get("tiny-txt2img").build()


@pytest.fixture(scope="module")
def folder(model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "trained"
    checkpoint.save(model, folder, tokenizer=Tokenizer.from_vocabulary(build_vocabulary(["a red circle"], size=64)))
    return folder


def assert_same(folder: Path, model: nn.Module) -> None:
    loaded = ldm_core.load(folder).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def one_line(err: str) -> str:
    assert "Traceback" not in err
    (line,) = err.strip().splitlines()
    assert line.startswith("ldm: ")
    return line


@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
def test_a_model_goes_out_and_comes_back_with_the_same_bits_and_tokenizer(
    ldm: Ldm, model: LatentDiffusion, folder: Path, layout: str
) -> None:
    code, out, err = ldm("export", folder, "out", "--format", layout, "--json")
    assert code == 0, err
    assert json.loads(out)["format"] == layout
    code, out, err = ldm("import", "out", "back", "--json", "--max-shard-gib", "0.01")
    assert code == 0, err
    facts = json.loads(out.splitlines()[-1])
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["tokenizer"]
    assert Path("back/model.safetensors.index.json").is_file()
    assert_same(Path("back"), model)
    assert Path("back/vocab.txt").read_bytes() == (folder / "vocab.txt").read_bytes()
    code, _, err = ldm("export", "back", "whole", "--format", "ldm")
    assert code == 0, err
    assert Path("whole/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    code, _, err = ldm("sample", "back", "a red circle", "--steps", 1, "--device", "cpu")
    assert code == 0, err


def test_a_first_stage_goes_out_and_comes_back(ldm: Ldm, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first_stage = build_first_stage(presets.first_stage("tiny-vq-f4"))
    torch.save(compvis.export_state(first_stage), tmp_path / "model.ckpt")
    for source, folder in (("model.ckpt", "a"), ("a-compvis", "b"), ("a-diffusers", "c")):
        code, _, err = ldm("import", source, folder)
        assert code == 0, err
        loaded = checkpoint.load_first_stage(folder).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in first_stage.state_dict().items())
        for layout in ("compvis", "diffusers"):
            code, _, err = ldm("export", folder, f"{folder}-{layout}", "--format", layout)
            assert code == 0, err
    assert "tiny-vq-f4 (raw weights)" in ldm("import", "model.ckpt", "d")[1]
    code, _, err = ldm("sample", "a", "a cat")
    assert code == 1
    assert "it holds a first stage alone: give it as autoencoder.weights" in one_line(err)


def test_a_model_without_captions_is_exported_too(ldm: Ldm, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = presets.get("tiny-class").build()
    checkpoint.save(model, tmp_path / "classes")
    code, out, err = ldm("export", "classes", "out", "--format", "compvis")
    assert code == 0, err
    assert "cannot express conditioner.unconditional_class=True" in out
    assert ldm("import", "out", "back")[0] == 0
    assert_same(tmp_path / "back", model)
    code, _, err = ldm("export", "classes", "diffusers")
    assert code == 1
    assert "diffusers has no pipeline for a model conditioned by ClassConfig" in one_line(err)
    assert not Path("diffusers").exists()


def test_a_tokenizer_may_be_given_and_its_absence_is_said(ldm: Ldm, model: LatentDiffusion, folder: Path) -> None:
    torch.save({"state_dict": compvis.export_state(model)}, "model.ckpt")
    code, out, err = ldm("import", "model.ckpt", "without")
    assert code == 0, err
    assert "add --tokenizer" in out
    for given in (folder / "vocab.txt", folder):
        target = f"with-{given.name}"
        code, out, err = ldm("import", "model.ckpt", target, "--tokenizer", given, "--preset", "tiny-txt2img")
        assert code == 0, err
        assert "--tokenizer" not in out
        assert checkpoint.load_tokenizer(target).vocabulary_size == checkpoint.load_tokenizer(folder).vocabulary_size


def test_what_cannot_be_imported_is_one_line_exit_1_and_leaves_nothing(ldm: Ldm, model: LatentDiffusion) -> None:
    state = compvis.export_state(model)
    state["model.diffusion_model.out.2.bias"] = torch.full((4,), float("nan"))
    torch.save({"state_dict": state}, "nan.ckpt")
    del state["model.diffusion_model.out.2.bias"]
    torch.save({"state_dict": state}, "lacking.ckpt")
    Path("text.ckpt").write_text("no checkpoint at all")
    Path("taken").mkdir()
    Path("taken/file").write_text("precious")
    before = sorted(path.name for path in Path().iterdir())
    for arguments, message in (
        (("absent.ckpt", "new"), "no checkpoint at absent.ckpt"),
        (("text.ckpt", "new"), "must be what torch.save wrote, or a safetensors file"),
        (("nan.ckpt", "new"), "NaN or infinity in unet.conv_out.bias"),
        (("lacking.ckpt", "new"), "no preset is "),
        (("lacking.ckpt", "new", "--preset", "tiny-txt2img"), "missing: model.diffusion_model.out.2.bias"),
        (("nan.ckpt", "new", "--weights", "ema"), "has no averaged weights"),
        (("nan.ckpt", "taken"), "taken exists and is not an empty folder: nothing is overwritten"),
    ):
        code, _, err = ldm("import", *arguments)
        assert code == 1
        assert message in one_line(err), err
        assert sorted(path.name for path in Path().iterdir()) == before
    assert Path("taken/file").read_text() == "precious"


def test_requests_that_make_no_sense_are_misuse(ldm: Ldm) -> None:
    for arguments, message in (
        (("--preset", "tiny-txt2imgs"), "the nearest is 'tiny-txt2img'"),
        (("--preset", "tiny-txt2img", "--config", "x.yaml"), "both say what x.ckpt is: give one"),
        (("--max-shard-gib", "0"), "0"),
        (("--weights", "best"), "best"),
    ):
        code, _, err = ldm("import", "x.ckpt", "new", *arguments)
        assert code == 2
        assert message in err


def test_a_hostile_checkpoint_runs_nothing(ldm: Ldm, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"state_dict": {"encoder.conv_in.weight": torch.ones(1)}, "callbacks": Hostile()}, "x.ckpt")
    code, _, err = ldm("import", "x.ckpt", "new")
    assert code == 1
    assert "no preset is " in one_line(err)
    assert not (tmp_path / "owned").exists()


KILLED = """
import os, signal, sys
# Ignored in what a shell runs in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
from ldm_core.weights import weights_files
save = weights_files.save_file
def save_then_die(weights, path, **options):
    save(weights, path, **options)
    if "-00002-of-" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
weights_files.save_file = save_then_die
from jobs import cli
sys.argv = ["ldm", "import", "model.ckpt", "new", "--preset", "tiny-txt2img", "--max-shard-gib", "0.01"]
cli.main()
"""


def test_a_killed_import_leaves_no_folder_that_loads(ldm: Ldm, model: LatentDiffusion, tmp_path: Path) -> None:
    torch.save({"state_dict": compvis.export_state(model)}, "model.ckpt")
    killed = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, check=False, timeout=120, env=_environment())
    assert killed.returncode == -signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert left
    assert not Path("new").exists()
    for path in left:
        with pytest.raises((FileNotFoundError, ValueError)):
            ldm_core.load(path)
    assert ldm("import", "model.ckpt", "new", "--preset", "tiny-txt2img")[0] == 0
    assert_same(tmp_path / "new", model)


def _environment() -> dict[str, str]:
    repository = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": repository}


def test_an_interrupted_import_cleans_up(model: LatentDiffusion, tmp_path: Path) -> None:
    torch.save({"state_dict": compvis.export_state(model)}, tmp_path / "model.ckpt")
    script = KILLED.replace(
        "os.kill(os.getpid(), signal.SIGKILL)", "print('here', flush=True); import time; time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment()
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


def test_a_full_disk_is_one_line_and_leaves_nothing(ldm: Ldm, full_disk: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    checkpoint.save(presets.get("tiny-uncond").build(), model)
    for command in ("import", "export"):
        source = model if command == "export" else tmp_path / "release"
        if command == "import":
            assert ldm("export", model, source, "--format", "compvis")[0] == 0
        code, _, err = ldm(command, source, full_disk / "out", *(["--format", "compvis"] * (command == "export")))
        assert code == 1
        assert "disk full" in err
        assert err.count("\n") == 1
        assert not list(full_disk.iterdir())
