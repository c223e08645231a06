"""Folders of Hugging Face diffusers: whole pipelines and first stages, read and written."""

from ldm_core.checkpoint_formats.diffusers.folder import INDEX_FILE, export_folder, import_folder

__all__ = ["INDEX_FILE", "export_folder", "import_folder"]
