"""scikit-learn's scans of handwritten digits as a folder of images: data that needs no download."""

import os
import secrets
import shutil
from pathlib import Path

from bincomm.data.cache import cache_folder


def digits() -> Path:
    """The folder of the digits, 8×8 PNG files in train/ and test/ by class; written on first use.

    It lies in bincomm's cache, see `bincomm.data.cache.cache_folder`.
    """
    cache = cache_folder()
    folder = cache / "digits"
    if folder.is_dir():
        return folder
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    cache.mkdir(parents=True, exist_ok=True)
    scans, labels = load_digits(return_X_y=True)
    _, test = train_test_split(range(len(scans)), test_size=0.2, stratify=labels, random_state=0)
    test = set(test)
    # Written beside it and renamed at the end, so that other processes see a complete folder or none.
    unfinished = cache / f".digits.{secrets.token_hex(4)}"
    unfinished.mkdir()
    try:
        for index, (scan, label) in enumerate(zip(scans, labels, strict=True)):
            path = unfinished / ("test" if index in test else "train") / str(label) / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((scan.reshape(8, 8) * (255 / 16)).round().astype("uint8")).save(path)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
