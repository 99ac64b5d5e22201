"""Runs on images of servers are those on the same shards here, to the bit, also stopped and resumed."""

import os
import signal
import urllib.parse

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bincomm import cli
from bincomm.configuration import configure
from bincomm.data import remote
from bincomm.data.export import write_shards
from bincomm.data.sources import open_source
from bincomm.engine.records import Records
from bincomm.engine.signals import Interrupted
from bincomm.pretraining import pretrain
from tests.servers import hub_at, serving, store
from tests.tiny_run import OPTIONS

pytest.importorskip("s3fs", reason="needs bincomm[remote]")
pytest.importorskip("aiohttp", reason="needs bincomm[remote]")
pytestmark = pytest.mark.slow

STOP = 7  # a step between two checkpoints
TAR = "/{test/data-00000,train/data-00000,train/data-00001,train/data-00002}.tar"


@pytest.fixture(scope="module")
def data(few_digits, tmp_path_factory):
    """A folder of tar shards, and in it a data set of Parquet files, user/name."""
    folder = tmp_path_factory.mktemp("served") / "data"
    source = open_source(str(few_digits), "all")
    write_shards(source, folder, shard_bytes=256 << 10)
    assert len(list(folder.glob("t*/*"))) == 4, "TAR names them"
    (folder / "user/name").mkdir(parents=True)
    for part in ("train", "test"):
        files = sorted((few_digits / part).glob("*/*.png"))
        images = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
        table = pa.table({"image": images, "label": [path.parent.name for path in files]})
        pq.write_table(table, folder / f"user/name/{part}-00000-of-00001.parquet", row_group_size=50)
    return folder


@pytest.fixture(autouse=True)
def _new_client(monkeypatch, tmp_path):
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", (0.01,) * 7)
    remote._client.cache_clear()


def arguments(data, output):
    return {**OPTIONS, "batch_size": 40, "data": data, "output": str(output)}


@pytest.fixture(scope="module")
def local(data, tmp_path_factory):
    """Uninterrupted runs on the same files here."""
    runs = {}
    for kind, name in (("tar", f"{data}{TAR}"), ("parquet", f"{data}/user/name")):
        runs[kind] = tmp_path_factory.mktemp("local") / kind
        pretrain(configure(**arguments(name, runs[kind])))
    return runs


def same(run, other):
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


def stopped_and_resumed(data, output):
    """A run that is stopped after a step by a signal, and resumed as by another process."""
    add = Records.add

    def interrupted(self, step, *rest):
        add(self, step, *rest)
        if step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Records, "add", interrupted)
        with pytest.raises(Interrupted):
            pretrain(configure(**arguments(data, output)))
    remote._client.cache_clear()
    pretrain(configure(**arguments(data, output)))


@pytest.mark.parametrize("faults", [{"drop": 9, "fail": 13}, {"slow": 0.005}])
def test_on_a_web_server(faults, data, local, tmp_path, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE_GIB", "0")
    with serving(data, **faults) as server:
        stopped_and_resumed(f"{server.address}{TAR}", tmp_path / "run")
        asked = server.requests()
    same(tmp_path / "run", local["tar"])
    assert len(asked) > 20 * 40  # as many as images, and more


def test_on_s3(data, local, tmp_path, monkeypatch):
    pytest.importorskip("moto", reason="needs moto[server]")
    import boto3

    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "secret-of-a-test"), ("PROFILE", "")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with store() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in data.glob("t*/*.tar"):
            client.upload_file(str(path), "bucket", f"deep/{path.relative_to(data)}")
        stopped_and_resumed("s3://bucket/deep/", tmp_path / "run")
    same(tmp_path / "run", local["tar"])
    config = (tmp_path / "run/config.yaml").read_text()
    assert "data: s3://bucket/deep/\n" in config
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"secret-of-a-test" in content for content in written)


def test_on_googles_store(data, local, tmp_path, monkeypatch):
    pytest.importorskip("gcsfs", reason="needs bincomm[remote]")
    with serving(data.parent) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
        stopped_and_resumed(f"gs://data{TAR}", tmp_path / "run")
    same(tmp_path / "run", local["tar"])


def test_on_the_hub(data, local, tmp_path, monkeypatch):
    with serving(data) as server:
        hub_at(server.address, monkeypatch)
        stopped_and_resumed("hf://datasets/user/name", tmp_path / "run")
    same(tmp_path / "run", local["parquet"])
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(b"Signature" in content for content in written)


def test_a_server_that_dies_leaves_a_run_that_can_be_resumed(data, local, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BINCOMM_CACHE_GIB", "0")
    add = Records.add
    with serving(data) as server:
        port = server.port
        options = arguments(server.address + TAR, tmp_path / "run")
        command = ["pretrain", *(f"--{key}={value}" for key, value in options.items())]

        def dies(self, step, *rest):
            add(self, step, *rest)
            if step == STOP:
                server.process.kill()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Records, "add", dies)
            assert cli.main(command) == 1
    error = capsys.readouterr().err
    address = urllib.parse.urlsplit(server.address).netloc
    assert f"error: http://{address}/train/data-0000" in error
    assert "after 8 attempts" in error
    assert not (tmp_path / "run/result.json").exists()
    assert not (tmp_path / "run/unusable.txt").exists()
    with serving(data, port=port):
        assert cli.main(command) == 0
    same(tmp_path / "run", local["tar"])
