"""What the tests of the pairs stage share: the misbehaving web server, and a way to run the stage."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import simplejpeg
from PIL import ImageFile

from pipelines.stage import StageContext
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.stage import STAGE
from pipelines.store.commits import ArtifactWriter
from pipelines.store.storage import Storage
from pipelines.tracking import null_stage_tracker
from tests.pipelines.stages.pairs.web_server import Web


@pytest.fixture
def server() -> Iterator[Web]:
    server = Web()
    yield server
    server.close()


@pytest.fixture
def decoders_called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the decoders that were let at a picture's pixels, in this process, from now on."""
    called: list[str] = []

    def watch(owner: Any, name: str) -> None:
        decode = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            called.append(name)
            return decode(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(simplejpeg, "decode_jpeg")
    watch(ImageFile.ImageFile, "load")
    return called


RunPairs = Callable[..., tuple[dict[str, Any], Storage]]


@pytest.fixture
def run_pairs(ray_cluster: None, tmp_path: Path) -> RunPairs:
    """Run the stage: details and folder. Options are the stage's config; `name` is the folder's.

    By one worker, if they do not say otherwise: each takes longer to start than it works here.
    """

    def run(name: str = "artifact", **options: Any) -> tuple[dict[str, Any], Storage]:
        storage = Storage(str(tmp_path / name))
        context = StageContext(
            config=PairsConfig.model_validate({"image_size": 32, "workers": 1, **options}),
            seed=0,
            writer=ArtifactWriter("pairs", "0" * 16, storage),
            upstream={},
            tracker=null_stage_tracker(),
            progress=lambda done, total, **facts: None,
            scratch=tmp_path,
        )
        return STAGE.run(context), storage

    return run
