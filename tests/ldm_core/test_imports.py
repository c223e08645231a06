"""ldm_core runs on a machine that has torch, numpy and safetensors alone of what the project uses."""

import subprocess
import sys

ABSENT = ("ray", "mlflow", "webdataset", "open_clip", "fsspec", "pydantic", "diffusers", "transformers", "tokenizers")

SCRIPT = """
import importlib, pkgutil, sys

absent = set(sys.argv[1:])
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Blocker())
import ldm_core
names = [module.name for module in pkgutil.walk_packages(ldm_core.__path__, "ldm_core.")]
for name in names:
    importlib.import_module(name)
from ldm_core import presets, load, samplers
model = presets.get("tiny-txt2img").build()
import torch
length = model.config.conditioner.max_length
model.sample(torch.zeros(1, length, dtype=torch.long), seeds=[0], num_steps=1)
leaked = absent & set(sys.modules)
assert not leaked, leaked
print(len(names), "modules")
"""


LIGHT_SCRIPT = """
import importlib, pkgutil, sys

import ldm_core.configs, ldm_core.model_files, ldm_core.presets
for package in (ldm_core.configs, ldm_core.presets):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from ldm_core import load, presets
from ldm_core.configs import parameter_count
for name in presets.names():
    config = presets.get(name)
    assert type(config).from_dict(config.to_dict()) == config
    assert parameter_count.unet_parameters(config.unet) > 0
assert "torch" not in sys.modules, "torch was imported"
"""


def test_configurations_and_presets_import_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT_SCRIPT], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_every_module_imports_and_a_model_samples_without_the_pipelines_packages() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *ABSENT], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 10
