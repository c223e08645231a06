"""Folders of Hugging Face diffusers: whole pipelines and first stages, read and written."""

from ldm_core.checkpoint_formats.diffusers import export_folder, import_folder

__all__ = ["export_folder", "import_folder"]
