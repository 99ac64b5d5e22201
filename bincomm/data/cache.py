"""Where bincomm keeps what it makes once: digits, listings, indices, downloaded data sets."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$BINCOMM_CACHE, or bincomm below $XDG_CACHE_HOME or ~/.cache; not made here."""
    named = os.environ.get("BINCOMM_CACHE")
    if named:
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "bincomm"
