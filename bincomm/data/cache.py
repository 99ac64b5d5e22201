"""Where bincomm keeps what it makes once: digits, listings, indices, downloaded data sets."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$BINCOMM_CACHE, or bincomm below $XDG_CACHE_HOME or ~/.cache; not made here."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("BINCOMM_CACHE") or Path(caches) / "bincomm")
