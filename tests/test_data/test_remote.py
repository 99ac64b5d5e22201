"""Shards on servers, which are processes here: the images of local ones, a bound, and clear errors."""

import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bincomm.data import remote
from bincomm.data.blocks import BLOCK, BlockCache
from bincomm.data.images import UnusableImageError, read
from bincomm.data.remote import UnreachableError
from bincomm.data.sources import evaluation_sources, open_source
from tests.servers import hub_at, serving, store

pytest.importorskip("s3fs", reason="needs bincomm[remote]")
pytest.importorskip("gcsfs", reason="needs bincomm[remote]")
pytest.importorskip("aiohttp", reason="needs bincomm[remote]")

IMAGES = 20  # in a shard
TRAIN, TEST = ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet")


def noise(number):
    """A PNG that cannot be compressed: 120 KB."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (200, 200, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder that is served: three tar shards, and a data set of Parquet files, user/name."""
    folder = tmp_path_factory.mktemp("served") / "data"
    (folder / "user/name/data").mkdir(parents=True)
    for shard in range(3):
        with tarfile.open(folder / f"x-{shard}.tar", "w") as tar:
            for number in range(IMAGES):
                content = noise(IMAGES * shard + number)
                member = tarfile.TarInfo(f"{shard}_{number}.png")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for path, labels in ((TRAIN, [0, 1, 2] * 4), (TEST, [2, 1, 0])):
        images = [{"bytes": noise(1000 + number), "path": "/etc/passwd"} for number in range(len(labels))]
        table = pa.table({"image": images, "label": labels})
        pq.write_table(table, folder / "user/name" / path, row_group_size=4)
    return folder


@pytest.fixture(autouse=True)
def _new_client(monkeypatch, own_cache):
    """Connections and settings of each test's own, and no waiting between attempts."""
    remote._client.cache_clear()
    monkeypatch.setattr(remote, "WAITS", (0.01,) * 4)
    monkeypatch.setattr(remote, "FIRST_WAITS", (0.01,) * 2)
    for name in ("AWS_PROFILE", "HF_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def server(data):
    with serving(data) as running:
        yield running


@pytest.fixture(scope="module")
def bucket(data):
    """A bucket of moto's server, with the served files below deep/."""
    pytest.importorskip("moto", reason="needs moto[server]")
    import boto3

    with store() as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setenv("AWS_ACCESS_KEY_ID", "key-of-a-test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-a-test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in filter(os.path.isfile, data.rglob("*")):
            client.upload_file(str(path), "bucket", f"deep/{path.relative_to(data)}")
        yield "s3://bucket/deep"


def same(source, expected):
    """Whether two sources have the same images, labels and names of files, in the same order."""
    assert len(source.images) == len(expected.images)
    for index in range(len(expected.images)):
        assert source.images.read(index).tobytes() == expected.images.read(index).tobytes()
        assert os.path.basename(source.images.name(index)) == os.path.basename(expected.images.name(index))
    assert source.classes == expected.classes
    assert (source.labels is None) == (expected.labels is None)
    assert source.labels is None or (source.labels == expected.labels).all()
    assert source.images.read(0).flags.writeable  # as DALI wants it


KEPT, NOT_KEPT = "1", "0"


@pytest.mark.slow
@pytest.mark.parametrize("gib", [KEPT, NOT_KEPT])
@pytest.mark.parametrize("kind", ["http", "s3", "gs", "hf"])
def test_images_are_those_of_local_shards(kind, gib, data, server, request, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE_GIB", gib)
    hub_at(server.address, monkeypatch)
    root = request.getfixturevalue("bucket") if kind == "s3" else server.address
    if kind == "gs":
        with serving(data.parent) as whole:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", whole.address)
            same(open_source("gs://data/x-{0..2}.tar"), open_source(f"{data}/x-{{0..2}}.tar"))
            same(open_source("gs://data/user/"), open_source(f"{data}/user/name/data"))
        return
    if kind != "hf":
        same(open_source(f"{root}/x-{{0..2}}.tar"), open_source(f"{data}/x-{{0..2}}.tar"))
        same(open_source(f"{root}/x-{{0,2}}.tar"), open_source(f"{data}/x-{{0,2}}.tar"))
    parquet = f"{root}/user/name/data/{{train,test}}-00000-of-00001.parquet"
    address = {"hf": "hf://datasets/user/name", "s3": f"{root}/user"}.get(kind, parquet)
    source, expected = open_source(address), open_source(f"{data}/user/name/data")
    same(source, expected)
    for ours, theirs in zip(
        evaluation_sources(address, source)[:2], evaluation_sources("x", expected)[:2], strict=True
    ):
        same(ours, theirs)
    same(open_source(address, "test"), open_source(f"{data}/user/name/data", "test"))
    if kind == "hf":  # a revision, also one with a slash, and a configuration
        for address in (
            "user/name@main/data",
            "user/name@refs%2Fconvert%2Fparquet",
            "user/name/data/t*.parquet",
        ):
            same(open_source(f"hf://datasets/{address}"), expected)
    assert bool(source.notes) == (gib == NOT_KEPT)


@pytest.mark.slow
def test_patterns_and_folders_of_a_bucket(bucket, data):
    local = open_source(f"{data}/x-*.tar")
    same(open_source(f"{bucket}/x-*.tar"), local)
    for address, words in (
        (f"{bucket}/", "expected tar shards or Parquet files, got both"),
        (f"{bucket}/none/", "expected shards .* at s3://bucket/deep/none/, got no files"),
        (f"{bucket}/y-*.tar", "expected shards .* got no files"),
        (f"{bucket}/y-{{0..2}}.tar", r"s3://bucket/deep/y-0\.tar: it does not exist"),
        ("s3://missing/x.tar", r"s3://missing/x\.tar: it does not exist"),
    ):
        with pytest.raises(ValueError, match=f"data: {words}"):
            open_source(address)


def parts(requests):
    """The (path, first byte, last byte) of requests for parts."""
    found = []
    for line in requests:
        _, path, span = line.split()
        if span != "-":
            found.append((path, *map(int, span.removeprefix("bytes=").split("-"))))
    return found


def test_what_is_kept_is_fetched_once(data, server):
    server.requests()
    source = open_source(server.address + "/x-{0..2}.tar")
    source.images.read(0)
    total = sum((data / f"x-{shard}.tar").stat().st_size for shard in range(3))
    asked = parts(server.requests())
    assert len(set(asked)) == len(asked)
    assert sum(last + 1 - first for _, first, last in asked) == total
    remote._client.cache_clear()  # as a process that begins
    again = open_source(server.address + "/x-{0..2}.tar")
    same(again, source)
    assert parts(server.requests()) == []


def test_of_parquet_files_little_is_fetched_to_list_them(data, monkeypatch):
    """Footers and labels, and one row group to see whether it holds images."""
    monkeypatch.setenv("BINCOMM_CACHE_GIB", NOT_KEPT)
    with serving(data) as server:
        source = open_source(f"{server.address}/user/name/{TRAIN}")
        asked = parts(server.requests())
        size = (data / "user/name" / TRAIN).stat().st_size
        assert sum(last + 1 - first for _, first, last in asked) < size / 2
        source.images.read(11)
        (last_group,) = parts(server.requests())
        assert last_group[2] - last_group[1] < size / 2


def test_a_file_that_changed_is_fetched_again(tmp_path):
    def write(number):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            content = noise(number)
            member = tarfile.TarInfo("a.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        return content

    with serving(tmp_path) as server:
        for number in range(2):
            remote._client.cache_clear()
            content = write(number)
            assert open_source(f"{server.address}/x.tar").images.read(0).tobytes() == content


@pytest.mark.slow
def test_losses_and_slowness_cost_attempts(data, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE_GIB", NOT_KEPT)
    with serving(data, drop=3, fail=5, slow=0.02) as server:
        same(open_source(server.address + "/x-{0..2}.tar"), open_source(f"{data}/x-{{0..2}}.tar"))
        assert len(parts(server.requests())) > 3 * IMAGES


@pytest.mark.slow
def test_a_server_that_does_not_answer(data, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", 0.3)
    with serving(data, slow=60) as server:
        address = f"{server.address}/x-0.tar"
        with pytest.raises(ValueError, match=rf"data: {address}: no answer within 0\.3 s \(after 3 attempts"):
            open_source(address)


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"status": 404}, "it does not exist"),
        ({"status": 403}, r"permission is refused \(403\).* comes from ~/.netrc"),
        ({"status": 401}, r"permission is refused \(401\)"),
        ({"status": 500}, r"the server answers 500.*after 3 attempts"),
        ({"whole": 1}, r"the server does not send parts of files \(ranges\)$"),
        ({"to": "http://127.0.0.1:9"}, "the server leads to another one without encryption"),
    ],
)
def test_errors_name_the_file_and_what_happened(faults, words, data):
    with serving(data, **faults) as server:
        address = f"{server.address}/x-0.tar"
        with pytest.raises(ValueError, match=f"data: {address}: {words}") as error:
            open_source(address)
        assert "\n" not in str(error.value)


def test_without_a_network():
    with pytest.raises(ValueError, match=r"data: http://127.0.0.1:9/x.tar: .*[Cc]onnect.*after 3 attempts"):
        open_source("http://127.0.0.1:9/x.tar")


@pytest.mark.slow
def test_a_bucket_that_refuses(bucket, monkeypatch, tmp_path):
    with serving(tmp_path, status=403) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        with pytest.raises(
            ValueError, match="s3://bucket/x.tar: permission is refused .*AWS_PROFILE"
        ) as error:
            open_source("s3://bucket/x.tar")
    assert "-of-a-test" not in str(error.value)


def test_the_hub_of_another_kind(data, monkeypatch):
    with serving(data) as server:
        hub_at(server.address, monkeypatch)
        with pytest.raises(ValueError, match="hf://datasets/user/none: it does not exist"):
            open_source("hf://datasets/user/none")
    (data / "user/script").mkdir(exist_ok=True)
    (data / "user/script/script.py").write_text("open('it-ran', 'w')")
    with serving(data) as server:
        hub_at(server.address, monkeypatch)
        remote._client.cache_clear()
        with pytest.raises(ValueError, match=r"expected shards .* got 1 × \.py"):
            open_source("hf://datasets/user/script")
        assert not [line for line in server.requests() if "resolve" in line]
    assert not os.path.exists("it-ran")


def test_names_that_a_server_lists_lie_where_it_was_asked(data, monkeypatch):
    with serving(data, tree="../../../other/set/x.parquet") as server:
        hub_at(server.address, monkeypatch)
        with pytest.raises(ValueError, match="the server names a file elsewhere"):
            open_source("hf://datasets/user/name")


def test_a_file_that_is_gone_ends_the_reading_and_is_no_unusable_image(data, tmp_path, monkeypatch):
    """Else another image would take its place, and the run would be another one."""
    monkeypatch.setenv("BINCOMM_CACHE_GIB", NOT_KEPT)
    for name, address in (("x-0.tar", "x-0.tar"), (TRAIN, "train.parquet")):
        source = data / name if name.endswith(".tar") else data / "user/name" / name
        (tmp_path / address).write_bytes(source.read_bytes())
        with serving(tmp_path) as server:
            images = open_source(f"{server.address}/{address}").images
            (tmp_path / address).unlink()
            with pytest.raises(UnreachableError, match=f"{server.address}/{address}: it does not exist"):
                read(images, 7)
        with pytest.raises(UnreachableError, match=f"{server.address}/{address}: .*after 5 attempts"):
            read(images, 8)


def test_a_member_beyond_the_end_of_its_shard_is_an_unusable_image(data, tmp_path):
    content = (data / "x-0.tar").read_bytes()[: 5 << 17]
    (tmp_path / "x.tar").write_bytes(content)
    with serving(tmp_path) as server:
        source = open_source(f"{server.address}/x.tar")
        with pytest.raises(UnusableImageError, match="the shard ends before the image does"):
            read(source.images, len(source.images) - 1)
        assert "is damaged, and was not read to its end" in source.notes[0]


# What is kept


def written(cache):
    return sum(path.stat().st_size for path in cache.folder.rglob("*") if path.is_file())


def test_the_bound_holds(tmp_path):
    cache = BlockCache(tmp_path / "blocks", limit=20 * BLOCK)
    for number in range(60):
        key = f"{number // 3:032}"
        cache.write(key, number % 3, bytes(BLOCK))
        os.utime(cache.folder / key, (number, number))
        assert written(cache) <= cache.limit
    assert cache.read(f"{19:032}", 2, BLOCK, 5, 8) == bytes(3)
    assert cache.read(f"{0:032}", 0, BLOCK, 0, 1) is None  # the oldest


WRITER = """
import sys
from pathlib import Path
from bincomm.data.blocks import BLOCK, BlockCache
cache = BlockCache(Path(sys.argv[1]), limit=20 * BLOCK)
for number in range(30):
    cache.write(f"{sys.argv[2]}{number // 3:031}", number % 3, bytes(BLOCK))
"""


@pytest.mark.slow
def test_the_bound_holds_for_several_processes(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "blocks")]
    processes = [subprocess.Popen([*command, name]) for name in "abc"]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert written(BlockCache(tmp_path / "blocks", 0)) <= 20 * BLOCK
    assert not list((tmp_path / "blocks").rglob("*.unfinished"))


def test_a_block_that_is_damaged_is_not_taken(tmp_path):
    cache = BlockCache(tmp_path / "blocks", limit=100 * BLOCK)
    cache.write("0" * 32, 0, b"x" * 1000)
    path = cache.folder / ("0" * 32) / "0"
    content = bytearray(path.read_bytes())
    for damaged in (content[:500], bytes(len(content)), content[:-1] + b"\0\0"):
        path.write_bytes(damaged)
        assert BlockCache(cache.folder, 100 * BLOCK).read("0" * 32, 0, 1000, 0, 10) is None
    path.write_bytes(content)
    assert BlockCache(cache.folder, 100 * BLOCK).read("0" * 32, 0, 1000, 0, 10) == b"x" * 10
    path.chmod(0o666)
    assert cache.read("0" * 32, 0, 1000, 0, 10) is None  # others may have written it


@pytest.mark.parametrize("value", ["-1", "x", "nan", ""])
def test_the_bound_is_a_number(value, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE_GIB", value)
    with pytest.raises(ValueError, match="BINCOMM_CACHE_GIB: expected a number of GiB of at least 0"):
        open_source("https://host/x.tar")


def test_a_cache_that_cannot_be_written_keeps_nothing(data, server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "file"))
    source = open_source(f"{server.address}/x-0.tar")
    same(source, open_source(f"{data}/x-0.tar"))
    assert "BINCOMM_CACHE_GIB" in source.notes[0]


# Processes


CHILD = """
import os, sys
from bincomm.data import remote
from bincomm.data.sources import open_source
images = open_source(sys.argv[1]).images
first = images.read(0)
child = os.fork()
if not child:
    client = remote._client(os.getpid())
    status = 0 if (images.read(0) == first).all() and images.read(30).size and client.file_systems else 1
    os._exit(status)
assert os.waitpid(child, 0)[1] == 0
assert images.read(59).size
"""


@pytest.mark.slow
def test_a_process_that_is_forked_has_connections_of_its_own(server):
    environment = {**os.environ, "BINCOMM_CACHE_GIB": NOT_KEPT}
    command = [sys.executable, "-c", CHILD, server.address + "/x-{0..2}.tar"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


# Addresses


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("file:///etc/x.tar", "begins with one of s3://.* give a path as it is"),
        ("ftp://host/x.tar", "begins with one of s3://"),
        ("simplecache::https://host/x.tar", "begins with one of s3://"),
        ("https::simplecache://host/x.tar", "begins with one of s3://"),
        ("https://host/x.tar::https://host/y.tar", "begins with one of s3://"),
        ("github://user:repository@main/x.tar", "begins with one of s3://"),
        ("https://user:PASSWORD@host/x.tar", "without a user, a password"),
        ("https://user:PASS/WORD@host/x.tar", "without a user, a password"),
        ("s3://KEY:PASSWORD@bucket/x.tar", "without a user, a password"),
        ("ftp://user:PASSWORD@host/x.tar", "begins with one of s3://"),
        ("https://host/x.tar?Signature=PASSWORD", "an address without . and #"),
        ("https://host/x.tar#PASSWORD", "an address without . and #"),
        ("s3://bucket/x-?.tar", "an address without . and #"),
        ("s3://*/x.tar", "expected a bucket or host"),
        ("https://host", "expected the names of shards"),
        ("https://host/folder/", "expected the names of shards"),
        ("https://host/x.zip", "expected the names of shards"),
        ("https://host/x-*.tar", "expected the names of shards"),
        ("hf://user/name", "expected hf://datasets/USER/NAME"),
        ("hf://spaces/user/name", "expected hf://datasets/USER/NAME"),
        ("hf://datasets/user", "expected hf://datasets/USER/NAME"),
    ],
)
@pytest.mark.parametrize("weights", [False, True])
def test_addresses_that_are_not_taken(data, words, weights, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("something connects to an address")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr(remote, "_file_system", lambda address: None)
    with pytest.raises(ValueError, match=f"data: .*{words}") as error:
        open_source({data: 1.0} if weights else data)
    assert "PASS" not in str(error.value)
    assert "WORD@" not in str(error.value)
    assert json.dumps(str(error.value)).isascii()
