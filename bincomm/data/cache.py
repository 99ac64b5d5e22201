"""The folder of files that bincomm creates only once: digits, listings, indices, downloaded data sets."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$BINCOMM_CACHE, or bincomm below $XDG_CACHE_HOME or ~/.cache; not created here.

    Raises:
        ValueError: there is no home directory.
    """
    try:
        folder = os.environ.get("BINCOMM_CACHE")
        if folder:
            return Path(folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bincomm"
    except RuntimeError as error:
        raise ValueError(
            "there is no home directory for the cache; set BINCOMM_CACHE to a folder that can be written"
        ) from error
