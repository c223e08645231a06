"""The folder in which a person's runs keep what outlives them on this machine."""

import os
from pathlib import Path


def home() -> Path:
    """Return `$LDM_HOME`, else `~/.local/share/ldm`; it need not exist."""
    return Path(os.environ.get("LDM_HOME") or "~/.local/share/ldm").expanduser().absolute()
