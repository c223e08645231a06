"""Moved to `checkpoint_formats.diffusers_config` and `.diffusers`; here until its last callers have followed."""

from ldm_core.checkpoint_formats.diffusers_config import (
    first_stage_config,
    scheduler_config,
    text_transformer_config,
    unet_config,
)

__all__ = ["first_stage_config", "scheduler_config", "text_transformer_config", "unet_config"]
