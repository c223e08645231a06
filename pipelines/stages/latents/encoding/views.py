"""Several views of a picture: mirrored, cropped. Each has a latent of its own, in a file of its own."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.stages.latents.config import ViewsConfig


def draw_view(picture: NDArray[np.uint8], view: int, config: ViewsConfig) -> NDArray[np.uint8]:
    """Return a view of a picture (H, W, 3), of its size. View 0 is the picture itself; of the others the odd ones are
    mirrored.

    Crops are drawn from the picture's content and the number of the view alone: the same picture has the same views,
    whatever its key and the run's seed, so that its latents can be taken over.
    """
    if not view:
        return picture
    if config.smallest_crop < 1:
        digest = hashlib.sha256(picture.tobytes()).digest()
        random = np.random.default_rng([view, *np.frombuffer(digest, np.uint32)])
        size = np.array(picture.shape[1::-1])
        crop = size * random.uniform(config.smallest_crop, 1)
        corner = random.uniform(0, 1, 2) * (size - crop)
        box = (*corner.tolist(), *(corner + crop).tolist())
        resized = Image.fromarray(picture).resize(tuple(size.tolist()), Image.Resampling.BICUBIC, box=box)
        picture = np.asarray(resized)
    return picture[:, ::-1] if config.mirror and view % 2 else picture
