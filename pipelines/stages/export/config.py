"""What a recipe says about the exported model."""

from pipelines.config import Config


class ExportConfig(Config):
    """The `export` stage: the final EMA weights as folders that other programs load.

    Args:
        diffusers: also write the layout of `diffusers.LDMTextToImagePipeline`; None where diffusers has a counterpart
            of the model (it pads prompts to 77 tokens, for example), true to insist.
    """

    diffusers: bool | None = None
