"""Shards in an object store, on a web server or on the Hugging Face hub, read in parts through fsspec."""

import asyncio
import hashlib
import io
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from bincomm.data.addresses import PERMISSION, check_address, redacted, scheme
from bincomm.data.blocks import BLOCK, SHARE, BlockCache, open_blocks
from bincomm.logs import printable_name

if TYPE_CHECKING:
    import yarl

logger = logging.getLogger(__name__)

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp", "http": "aiohttp", "hf": "huggingface_hub"}
PARALLEL = 8  # shards that are looked at, or listed, at once
REQUEST = 1 << 23  # bytes, the most that are asked for at once
TIMEOUT = 30  # seconds without an answer, or without a further byte of it
DEADLINE = 300  # seconds for all of an answer
WAITS = (0.5, 1, 2, 4, 8, 16, 30)  # seconds before each further attempt
FIRST_WAITS = WAITS[:2]  # where the host has not answered yet: it is more likely to be wrong than busy
REPORTED = 3  # attempts that failed, from which on a user is told
LONGEST_REASON = 300  # characters
TOO_MANY = 429  # of the statuses of HTTP: too many requests
Result = TypeVar("Result")


class UnreachableError(Exception):
    """A file that is stored elsewhere cannot be read; the message names it and says what happened."""


class _RefusedError(Exception):
    """An answer that is not taken."""


class RemoteFile(str):
    """A file that is stored elsewhere: its address, and what is needed to read it.

    Nothing else is fetched: a text that looks like an address is the name of a local file to whoever reads
    it. Only `find_shards` makes one, from what a user gave as data.
    """

    __slots__ = ("kept", "key", "size")

    size: int  # bytes
    key: str  # of its blocks; another one for each state of it
    kept: bool  # whether its blocks are

    def __new__(cls, address: str, size: int, version: str) -> "RemoteFile":
        file = super().__new__(cls, address)
        state = f"{address} {size} {version}"
        file.key = hashlib.sha256(os.fsencode(state)).hexdigest()[:32]
        file.size, file.kept = size, False
        return file

    def read(self, offset: int, size: int) -> np.ndarray:
        """Bytes of the file: (n,) uint8, fewer than `size` where it ends before.

        Raises:
            UnreachableError: it cannot be read.
        """
        end = min(offset + size, self.size)
        data = np.empty(max(0, end - offset), np.uint8)
        begin = offset
        while begin < end:
            until = min(end, (begin // BLOCK + 1) * BLOCK if self.kept else begin + REQUEST)
            part = self._kept(begin, until) if self.kept else self._fetch(begin, until)
            data[begin - offset : until - offset] = np.frombuffer(part, np.uint8)
            begin = until
        return data

    def _kept(self, begin: int, end: int) -> bytes:
        """Bytes of one block, which is kept."""
        client, number = _client(os.getpid()), begin // BLOCK
        first = number * BLOCK
        size = min(BLOCK, self.size - first)
        where = self.key, number, size, begin - first, end - first
        if (data := client.blocks.read(*where)) is not None:
            return data
        with client.locks[hash(where[:2]) % len(client.locks)]:
            if (data := client.blocks.read(*where)) is not None:  # another thread was faster
                return data
            block = self._fetch(first, first + size)
            client.blocks.write(self.key, number, block)
            return block[begin - first : end - first]

    def _fetch(self, begin: int, end: int) -> bytes:
        def request(file_system: Any) -> bytes:
            data = _read(file_system, self, begin, end)
            if len(data) > end - begin:
                raise _RefusedError("the server does not send parts of files (ranges)")
            if len(data) < end - begin:
                raise EOFError(f"{len(data)} of {end - begin} bytes came")
            return data

        return _ask(self, request)


class RemoteReader(io.RawIOBase):
    """A file that is stored elsewhere, by the interface of Python's files."""

    def __init__(self, file: RemoteFile) -> None:
        self.file, self.at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.file.size}[whence]
        if base + offset < 0:
            raise OSError(0, f"a position of {base + offset} bytes")
        self.at = base + offset
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(self.at, len(buffer))
        memoryview(buffer)[: len(data)] = data.data
        self.at += len(data)
        return len(data)


class _Client(NamedTuple):
    """What each process has of its own: connections, the thread that serves them, and locks, none of which
    works on in a process that was forked."""

    file_systems: dict[str, Any]  # by the scheme of addresses
    answered: set[str]  # beginnings of addresses from which something came
    blocks: BlockCache
    locks: list[threading.Lock]
    lock: threading.Lock


@cache
def _client(process: int) -> _Client:
    """The client of a process, by its number."""
    return _Client({}, set(), open_blocks(), [threading.Lock() for _ in range(64)], threading.Lock())


def find_shards(addresses: Sequence[str], endings: tuple[str, ...]) -> tuple[list[RemoteFile], list[str]]:
    """The files that addresses stand for, in order, and notes for the user.

    An address is that of a file, if it ends so; of several, if it holds a `*`; or of a folder, with the files
    at any depth below.

    Args:
        addresses: without braces.
        endings: of the names that are taken.

    Raises:
        ValueError: an address that is not taken, a folder without such files, or a package is missing.
        UnreachableError: a file does not exist, or cannot be reached; the message names it.
    """
    for address in addresses:
        check_address(address)
        _file_system(address)  # here, because packages are not to be imported by several threads at once
    with ThreadPoolExecutor(PARALLEL, "bincomm-find") as pool:
        found = pool.map(lambda address: _find(address, endings), addresses)
        files = [file for part in found for file in part]
    blocks = _client(os.getpid()).blocks
    total = sum(file.size for file in files)
    kept = total <= SHARE * blocks.limit
    for file in files:
        file.kept = kept
        blocks.open(file.key)
    if kept:
        return files, []
    gib, room = (count / 2**30 for count in (total, SHARE * blocks.limit))
    return files, [
        f"{gib:.3g} GiB of shards are more than the {room:.3g} GiB that the cache has for them (see "
        "BINCOMM_CACHE_GIB, and what is free on its disk), so every epoch fetches its images again"
    ]


def map_files(function: Callable[[str], Result], paths: Sequence[str]) -> list[Result]:
    """A function of each shard: of several at once, where they are stored elsewhere and one waits for it."""
    if not any(isinstance(path, RemoteFile) for path in paths):
        return [function(path) for path in paths]
    with ThreadPoolExecutor(PARALLEL, "bincomm-look") as pool:
        return list(pool.map(function, paths))


def _find(address: str, endings: tuple[str, ...]) -> list[RemoteFile]:
    """See `find_shards`."""
    kind = scheme(address)
    single = "*" not in address and address.lower().endswith(endings)
    if not single and kind in ("http", "https"):
        raise ValueError(
            f"data: expected the names of shards ({', '.join(endings)}), for a web server lists none, got "
            f"{address}"
        )
    path = _path(address)

    def request(file_system: Any) -> Mapping[str, Mapping[str, Any]]:
        if single:
            return {path: file_system.info(path)}
        if "*" in address:
            return file_system.glob(path, detail=True)
        return file_system.find(path, detail=True)

    others: Counter[str] = Counter()
    files = []
    for name, status in sorted(_ask(address, request).items()):
        if status.get("type") == "directory":
            if single:
                raise ValueError(f"data: expected a file at {address}, got a folder")
            continue
        if name.lower().endswith(endings):
            # Names come from the server: what it calls so lies where it was asked for, or is not taken.
            begin = path.partition("*")[0].partition("@")[0] if kind == "hf" else path.partition("*")[0]
            if not name.startswith(begin) or "/../" in name:
                raise UnreachableError(
                    f"{address}: the server names a file elsewhere, {printable_name(name)}"
                )
            size = status.get("size")
            if size is None:
                raise UnreachableError(f"{address}: the server does not say how large it is")
            files.append(RemoteFile(_address(kind, name), int(size), _version(status)))
        else:
            others[os.path.splitext(name)[1].lower() or "no extension"] += 1
    if not files:
        content = ", ".join(f"{count} × {extension}" for extension, count in others.most_common(5))
        raise ValueError(
            f"data: expected shards ({', '.join(endings)}) at {address}, got {content or 'no files'}"
            + ("; `bincomm data shard` writes shards of a folder of images" if others else "")
        )
    return files


def _version(status: Mapping[str, Any]) -> str:
    """What tells one state of a file from another, as far as the server says."""
    names = ("ETag", "etag", "generation", "md5Hash", "blob_id", "xet_hash", "Content-MD5", "Last-Modified")
    return " ".join(str(status[name]) for name in (*names, "LastModified") if status.get(name))


def _path(address: str) -> str:
    """An address as its file system names it."""
    return address if scheme(address) in ("http", "https") else address.partition("://")[2].rstrip("/")


def _address(kind: str, path: str) -> str:
    return path if kind in ("http", "https") else f"{kind}://{path}"


def _read(file_system: Any, file: RemoteFile, begin: int, end: int) -> bytes:
    """One request."""
    from fsspec.asyn import AsyncFileSystem, sync

    path = _path(file)
    if isinstance(file_system, AsyncFileSystem):
        return sync(file_system.loop, file_system._cat_file, path, start=begin, end=end, timeout=DEADLINE)
    # Without what it would read ahead, and without asking for the size.
    with file_system.open(path, "rb", cache_type="none", size=file.size) as opened:
        opened.seek(begin)
        return opened.read(end - begin)


def _ask(address: str, request: Callable[[Any], Result]) -> Result:
    """The result of a request to an address's file system, which is repeated while its failure may pass.

    Raises:
        UnreachableError: it failed in the end.
        ValueError: a package is missing.
    """
    file_system, answered = _file_system(address), _client(os.getpid()).answered
    place, shown = "/".join(address.split("/", 3)[:3]), printable_name(address)
    begin = time.monotonic()
    failed = 0
    while True:
        try:
            result = request(file_system)
            answered.add(place)
            return result
        except Exception as error:  # each library has errors of its own
            reason, may_pass = _judge(error, address)
        failed += 1
        waits = WAITS if place in answered else FIRST_WAITS
        if not may_pass or failed > len(waits):
            # Without the error itself, whose text may hold a signature.
            seconds = time.monotonic() - begin
            times = f" (after {failed} attempts in {seconds:.0f} s)" if failed > 1 else ""
            raise UnreachableError(f"{shown}: {reason}{times}") from None
        level = logging.INFO if failed >= REPORTED else logging.DEBUG
        logger.log(level, "%s: %s; another attempt follows", shown, reason, extra={"every_rank": True})
        time.sleep(waits[failed - 1])


def _judge(error: BaseException, address: str) -> tuple[str, bool]:
    """Why a request failed, in words, and whether it may succeed later."""
    kind, cause = scheme(address), error.__cause__
    if isinstance(error, FileNotFoundError) and cause and kind in ("http", "https", "hf"):
        return _judge(cause, address)  # whatever it is, these say that there is no file
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "it does not exist", False
    if isinstance(error, PermissionError) or status in (401, 403):
        return (
            f"permission is refused ({status or _line(error)}), or there is nothing of this name; permission "
            f"comes from {PERMISSION[kind]}",
            False,
        )
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)) or "Timeout" in type(error).__name__:
        return f"no answer within {TIMEOUT} s", True
    if status:
        return f"the server answers {status} {_line(error, '')}".strip(), status >= 500 or status == TOO_MANY
    if isinstance(error, _RefusedError):
        return str(error), False
    programming = isinstance(error, (TypeError, AttributeError, NotImplementedError, ImportError))
    return f"{type(error).__name__}: {_line(error)}", not programming


def _status(error: BaseException) -> int:
    """The status of HTTP that an error is about; 0 if of none."""
    response = getattr(error, "response", None)
    for holder, name in ((error, "status"), (error, "code"), (response, "status_code")):
        status = getattr(holder, name, None)
        if str(status).isdigit():
            return int(str(status))
    return 0


def _line(error: BaseException, otherwise: str = "no reason given") -> str:
    """What an error says, in one line, without queries of addresses."""
    message = getattr(error, "message", None) or str(error)
    return printable_name(redacted(" ".join(str(message).split())))[:LONGEST_REASON] or otherwise


def _file_system(address: str) -> Any:
    """The file system of an address, of this process.

    Raises:
        ValueError: its package is missing.
    """
    client, kind = _client(os.getpid()), scheme(address)
    with client.lock:
        if kind not in client.file_systems:
            try:
                client.file_systems[kind] = _MAKERS[kind]()
            except ImportError as error:
                raise ValueError(
                    f"data: {kind}:// needs the package {PACKAGES[kind]} ({error}): "
                    "pip install 'bincomm[remote]'"
                ) from error
        return client.file_systems[kind]


def _s3() -> Any:
    import botocore.session
    from s3fs import S3FileSystem

    config = {
        "connect_timeout": TIMEOUT,
        "read_timeout": TIMEOUT,
        "retries": {"total_max_attempts": 1},  # attempts are counted here
        "max_pool_connections": 64,
    }
    anonymous = botocore.session.get_session().get_credentials() is None
    file_system = S3FileSystem(anon=anonymous, config_kwargs=config, skip_instance_cache=True)
    file_system.retries = 1
    return file_system


def _gs() -> Any:
    from gcsfs.core import GCSFileSystem  # the other one asks for the kind of bucket before each reading

    return GCSFileSystem(access="read_only", requests_timeout=TIMEOUT, skip_instance_cache=True)


def _hf() -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem(skip_instance_cache=True)


def _http() -> Any:
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(_check_redirect)
    trace.on_request_end.append(_check_answer)
    options = {
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT),
        "headers": {"Accept-Encoding": "identity"},  # a part of a compressed file is of no use
        "trace_configs": [trace],
        "trust_env": True,  # proxies and ~/.netrc
    }
    return HTTPFileSystem(client_kwargs=options, skip_instance_cache=True)


_MAKERS = {"s3": _s3, "gs": _gs, "https": _http, "http": _http, "hf": _hf}


async def _check_redirect(session: Any, context: Any, request: Any) -> None:
    """Follow the server to another address if that is encrypted, else only on the same host."""
    headers = request.response.headers
    target = request.url.join(_url(headers.get("Location") or headers.get("URI") or ""))
    if target.scheme != "https" and target.origin() != request.url.origin():
        request.response.close()
        raise _RefusedError(
            f"the server leads to another one without encryption, {target.scheme}://{target.host}"
        )


async def _check_answer(session: Any, context: Any, request: Any) -> None:
    """Take no more than was asked for."""
    if "Range" in request.headers and request.response.status in (200, 206):
        length = request.response.content_length
        if request.response.status == 200 or length is None or length > REQUEST:
            request.response.close()
            raise _RefusedError("the server does not send parts of files (ranges)")


def _url(text: str) -> "yarl.URL":
    import yarl

    return yarl.URL(text)
