"""scikit-learn's scans of handwritten digits as a folder of images: data that needs no download."""

import os
import secrets
import shutil
from pathlib import Path

from bincomm.data.cache import cache_folder, make_folder, unwritable


def digits() -> Path:
    """The folder of the digits, 8×8 PNG files in train/ and test/ by class; written on first use.

    It lies in bincomm's cache, see `bincomm.data.cache.cache_folder`.

    Raises:
        ValueError: the cache cannot be written, or others can write in it.
    """
    folder = cache_folder("digits")
    if folder.is_dir():
        return folder
    try:
        _write_digits(folder)
    except OSError as error:
        raise unwritable(error) from error
    return folder


def _write_digits(folder: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    _, test = train_test_split(range(len(scans)), test_size=0.2, stratify=labels, random_state=0)
    test = set(test)
    # Written beside it and renamed at the end, so that other processes see a complete folder or none.
    unfinished = folder.with_name(f".digits.{secrets.token_hex(4)}")
    make_folder(unfinished)
    try:
        for index, (scan, label) in enumerate(zip(scans, labels, strict=True)):
            path = unfinished / ("test" if index in test else "train") / str(label) / f"{index:04}.png"
            make_folder(path.parent)
            Image.fromarray((scan.reshape(8, 8) * (255 / 16)).round().astype("uint8")).save(path)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
