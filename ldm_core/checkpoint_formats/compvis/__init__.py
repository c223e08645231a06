"""Checkpoints of the paper's code release: `.ckpt` and `.safetensors` files of whole models and of first stages."""

from ldm_core.checkpoint_formats.compvis.checkpoint import (
    SCHEDULE_BUFFERS,
    Weights,
    export_folder,
    export_state,
    holds_whole_model,
    import_checkpoint,
    infer_preset,
    load_configuration,
    schedule_buffers,
)

__all__ = [
    "SCHEDULE_BUFFERS",
    "Weights",
    "export_folder",
    "export_state",
    "holds_whole_model",
    "import_checkpoint",
    "infer_preset",
    "load_configuration",
    "schedule_buffers",
]
