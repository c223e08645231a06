"""Moved to `checkpoint_formats.diffusers_names`; here until its last callers have followed."""

from ldm_core.checkpoint_formats.diffusers_names import first_stage_weights, text_transformer_weights, unet_weights

__all__ = ["first_stage_weights", "text_transformer_weights", "unet_weights"]
