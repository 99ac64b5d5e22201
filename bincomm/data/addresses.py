"""Addresses of data that is stored elsewhere: which are taken, and what of them may be shown and written."""

import os
import re

ADDRESS = re.compile(r"([A-Za-z][\w+.-]*)(://|::)")
# What an address may begin with, and where the store's own programs take a user's permission from.
PERMISSION = {
    "s3": "AWS_PROFILE, AWS_ACCESS_KEY_ID or ~/.aws",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth application-default login`",
    "https": "~/.netrc",
    "http": "~/.netrc",
    "hf": "HF_TOKEN or `hf auth login`",
}
# A bucket, or a host with its port; with braces, for a range may be there.
PLACE = re.compile(r"[\w.{},-]+(:\d+)?")


def is_address(data: str) -> bool:
    """Whether a source of images is an address, and no file or folder that is named like one."""
    return ADDRESS.match(data) is not None and not os.path.exists(data)


def scheme(address: str) -> str:
    """What an address begins with, such as s3."""
    match = ADDRESS.match(address)
    return match[1] if match else ""


def check_address(data: str) -> None:
    """Check a source of images, if it is an address: it is written into a run's files, and shown.

    Raises:
        ValueError: it begins with none of `PERMISSION`, or holds what may be a password or a signature; the
            message does not repeat that.
    """
    if not is_address(data):
        return
    kind, rest = scheme(data), data.partition("://")[2]
    if kind not in PERMISSION or "::" in data:
        advice = "; give a path as it is" if kind == "file" else ""
        allowed = ", ".join(f"{name}://" for name in PERMISSION)
        raise ValueError(
            f"data: expected an address that begins with one of {allowed}, got {redacted(data)}{advice}"
        )
    place, _, path = rest.partition("/")
    if not PLACE.fullmatch(place):
        raise ValueError(
            f"data: expected a bucket or host behind {kind}://, without a user, a password or patterns, got "
            f"an address of another form; permission comes from {PERMISSION[kind]}"
        )
    if "?" in data or "#" in data:
        raise ValueError(
            f"data: expected an address without ? and #, got {redacted(data)}: what follows may be a "
            "signature, and the address is written into the run's files; permission comes from "
            f"{PERMISSION[kind]}"
        )
    if kind == "hf" and (place != "datasets" or not re.match(r"[^/]+/[^/]", path)):
        raise ValueError(f"data: expected hf://datasets/USER/NAME, got {data}")
    if kind in ("http", "https") and ("*" in path or not path):
        raise ValueError(
            f"data: expected the names of shards, for a web server lists none, got {data}; for example "
            f"{kind}://{place}/data-{{000..127}}.tar"
        )


def redacted(text: str) -> str:
    """Text without what addresses in it have as a user, a password, a query or a fragment."""
    text = re.sub(r"(://)[^/\s'\"]*@", r"\1", text)
    return re.sub(r"(://[^\s'\"?#]*)[?#][^\s'\"]*", r"\1?...", text)
