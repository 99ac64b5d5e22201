"""Blocks of files that are stored elsewhere, kept in bincomm's cache up to a bound, for several processes."""

import os
import shutil
import stat
import threading
import zlib
from contextlib import suppress
from pathlib import Path

from bincomm.data.cache import cache_folder, make_folder, who_else_writes, write_cached
from bincomm.files import lock, tell_once

BLOCK = 1 << 20  # bytes that are fetched and kept at once
CHECKSUM = 4  # bytes behind those of a block
DEFAULT_GIB = 20  # that are kept
SHARE = 0.9  # of the bound, to which the blocks are reduced
STRIDE = 0.01  # share of the bound that a process writes before it looks at what all have written
FREE_SHARE = 0.5  # of what is free on the disk, the most that is taken of it


class BlockCache:
    """Blocks in files of their own, `KEY/NUMBER`, so that they are there whole or not at all.

    A key stands for one state of one file. What was opened longest ago is removed first.

    Args:
        folder: of the blocks.
        limit: bytes that all blocks may take. A process looks at it after writing a hundredth, so that up to
            ten stay below it together.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._checked: set[tuple[str, int]] = set()  # whose checksums held
        self._written = 0
        self._lock = threading.Lock()

    def read(self, key: str, number: int, size: int, begin: int, end: int) -> bytes | None:
        """A block's bytes from `begin` to `end`, of its `size`; None where it is not kept."""
        try:
            with open(self.folder / key / str(number), "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if status.st_size != size + CHECKSUM or who_else_writes(status):
                    return None
                if (key, number) not in self._checked:
                    data = file.read(size)
                    if zlib.crc32(data).to_bytes(CHECKSUM, "little") != file.read(CHECKSUM):
                        return None
                    self._checked.add((key, number))
                    return data[begin:end]
                return os.pread(file.fileno(), end - begin, begin)
        except OSError:
            return None

    def write(self, key: str, number: int, data: bytes) -> None:
        """Keep a block, unless the disk does not take it."""
        with self._lock:
            self._written += len(data)
            full = self._written > STRIDE * self.limit
            if full:
                self._written = 0
        try:
            if full:
                self.trim()
            # Not forced onto the disk: a block that a power failure spoils is known by its checksum.
            content = data + zlib.crc32(data).to_bytes(CHECKSUM, "little")
            write_cached(self.folder / key / str(number), content, durable=False)
            self._checked.add((key, number))
        except OSError as error:
            tell_once(f"the cache cannot keep what is fetched, which is fetched again: {error.strerror}")

    def open(self, key: str) -> None:
        """Note that the blocks of a key are used again."""
        with suppress(OSError):
            os.utime(self.folder / key)

    def trim(self) -> int:
        """Remove what was opened longest ago until the blocks are below the bound; returns their bytes.

        Raises:
            OSError: the folder cannot be written.
        """
        make_folder(self.folder)
        with open(self.folder / "lock", "w") as file:
            lock(file, wait=True)
            kept = sorted(self._keys())
            total = sum(size for _, size, _ in kept)
            for _, size, folder in kept:
                if total <= SHARE * self.limit:
                    break
                shutil.rmtree(folder, ignore_errors=True)
                total -= size
            return total

    def _keys(self) -> list[tuple[int, int, str]]:
        """When each key was opened last, the bytes of its blocks, and its folder."""
        found = []
        with os.scandir(self.folder) as keys:
            for key in keys:
                with suppress(OSError):  # removed meanwhile
                    status = key.stat(follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        with os.scandir(key.path) as blocks:
                            size = sum(block.stat(follow_symlinks=False).st_size for block in blocks)
                        found.append((status.st_mtime_ns, size, key.path))
        return found


def open_blocks() -> BlockCache:
    """The blocks in bincomm's cache: at most $BINCOMM_CACHE_GIB, and not more than the disk has room for.

    Raises:
        ValueError: that is no number, or others can write in the cache.
    """
    text = os.environ.get("BINCOMM_CACHE_GIB", str(DEFAULT_GIB))
    try:
        gib = float(text)
        if not 0 <= gib < 1 << 33:
            raise ValueError
    except ValueError:
        raise ValueError(f"BINCOMM_CACHE_GIB: expected a number of GiB of at least 0, got {text!r}") from None
    blocks = BlockCache(cache_folder("remote"), int(gib * 2**30))
    try:
        room = blocks.trim() + int(FREE_SHARE * shutil.disk_usage(blocks.folder).free)
        blocks.limit = min(blocks.limit, room)
    except OSError:
        blocks.limit = 0
    return blocks
