"""What is no source of images, and how to make one of it."""

import os
import re

ACCEPTED = "expected a folder of images, tar or Parquet shards, a .txt file of paths"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What is not read, by how its name ends, and how to get there.
ADVICE = {
    (".zip", ".7z", ".rar"): "an archive: unpack it, and give the folder",
    (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"): (
        "a compressed tar file: unpack it and give the folder, or decompress it and give the .tar"
    ),
    (".npz", ".npy", ".pt", ".pth", ".h5", ".hdf5", ".mat", ".pkl"): (
        "a file of arrays: write each image into a file, as a PNG for example, and give the folder; an array "
        "of uint8 by `PIL.Image.fromarray(array).save(NAME)`"
    ),
    (".arrow", ".csv", ".tsv", ".json", ".jsonl", ".tfrecord", ".lmdb"): (
        "a table: write its images into a folder, tar shards or Parquet files, or their paths into a .txt "
        "file, one a line"
    ),
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"): "one image: give its folder",
}


def describe(data: str) -> str:
    """What this is instead of a source, and what to do."""
    exists = os.path.exists(os.path.expanduser(data))
    does_not_exist = "" if exists else " does not exist, and"
    for endings, advice in ADVICE.items():
        if data.lower().endswith(endings):
            return f"{data!r}{does_not_exist} is {advice}"
    if exists:
        return f"{data!r} is no folder, text file of paths, tar or Parquet file"
    if HUB_NAME.fullmatch(data):
        return (
            f"{data!r} does not exist here; give hf://datasets/{data} for a set of Parquet files on the hub, "
            f"or download it, `hf download --repo-type dataset {data} --local-dir FOLDER`, and give FOLDER"
        )
    return f"{data!r} does not exist"
