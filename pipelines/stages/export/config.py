"""The `export` section of a recipe."""

from pipelines.config import Config


class ExportConfig(Config):
    """The `export` stage: write the final EMA weights as folders that other programs load.

    Args:
        diffusers: also write the layout of `diffusers.LDMTextToImagePipeline`. None writes it if diffusers has a
            counterpart of the model (it pads prompts to 77 tokens, for example); true fails if it has none.
    """

    diffusers: bool | None = None
