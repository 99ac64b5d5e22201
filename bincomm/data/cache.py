"""The folder of files that bincomm creates only once: digits, listings, indices, downloaded data sets."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$BINCOMM_CACHE, or bincomm below $XDG_CACHE_HOME or ~/.cache; not created here."""
    folder = os.environ.get("BINCOMM_CACHE")
    if folder:
        return Path(folder)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "bincomm"
