import fcntl
import filecmp
import functools
import http.server
import inspect
import io
import os
import sys
import tarfile
import threading
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import IncompleteRead

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets
from torchvision.datasets import utils

from bincomm.data.standard import PARTS, SETS, open_standard

CALLS = "calls"  # a file that the fakes add a line to whenever they are called


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache is a new folder, and nothing leaves this machine."""
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", raising(urllib.error.URLError("no network in tests")))
    return tmp_path / "cache"


class Pictures:
    """Like CIFAR10: decoded pictures, five to train with and three to test with; no network."""

    classes = ("cat", "dog")
    fail_at = None  # (train, index, error)

    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        assert download
        with open(os.path.join(root, "raw.bin"), "w") as file:
            file.write("raw")
        cache = os.environ["BINCOMM_CACHE"]
        with open(os.path.join(cache, CALLS), "a") as file:
            file.write("called\n")
        self.train = train

    def __len__(self):
        return 5 if self.train else 3

    def __getitem__(self, index):
        if self.fail_at and self.fail_at[:2] == (self.train, index):
            raise self.fail_at[2]
        return Image.new("RGB", (4, 4), (index, 100 * self.train, 7)), index % 2


class Unpacked:
    """Like Food101: files below its root, which are unpacked by the first one made there."""

    classes = ("apple", "bread", "cake")

    def __init__(
        self, root, split="train", transform=None, target_transform=None, download=False, loader=None
    ):
        assert download
        self.files = []
        for index in range(6 if split == "train" else 3):
            path = os.path.join(root, "inner", split, f"{9 - index}.jpg")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as file:
                file.write("not decoded")
            self.files.append(path)
        self.loader = loader

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return self.loader(self.files[index]), index % 3


class Untouchable:
    def __init__(self, *args, **kwargs):
        raise AssertionError("torchvision was called again")


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def below(folder):
    return sorted(
        os.path.relpath(os.path.join(parent, file), folder)
        for parent, _, files in os.walk(folder)
        for file in files
    )


def test_pictures_are_written_once_and_listed_after(cache, monkeypatch):
    monkeypatch.setattr(datasets, "CIFAR10", Pictures)
    paths, labels, classes = open_standard("cifar10", "pretraining")
    folder = cache / "sets" / "cifar10"
    assert paths == [str(folder / "files" / "train" / f"{index:06}.png") for index in range(5)]
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 1, 0, 1, 0]
    assert classes == ["cat", "dog"]
    for index, path in enumerate(paths):
        with Image.open(path) as image:
            assert (image.format, image.size, image.getpixel((3, 3))) == ("PNG", (4, 4), (index, 100, 7))
    # What torchvision works on is not kept.
    expected = [f"test/{index:06}.png" for index in range(3)] + [
        f"train/{index:06}.png" for index in range(5)
    ]
    assert below(folder / "files") == sorted([*expected, "index.json"])
    assert sorted(os.listdir(folder)) == ["files", "lock"]

    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it fails
    again, labels, classes = open_standard("cifar10", "gallery")
    assert (again, labels.tolist(), classes) == (paths, [0, 1, 0, 1, 0], ["cat", "dog"])
    queries, labels, classes = open_standard("cifar10", "queries")
    assert queries == [str(folder / "files" / "test" / f"{index:06}.png") for index in range(3)]
    assert (labels.tolist(), classes) == ([0, 1, 0], ["cat", "dog"])
    with Image.open(queries[2]) as image:
        assert image.getpixel((0, 0)) == (2, 0, 7)


def test_unpacked_files_are_used_as_they_are(cache, monkeypatch):
    monkeypatch.setattr(datasets, "Food101", Unpacked)
    files = cache / "sets" / "food101" / "files" / "set" / "inner"
    paths, labels, classes = open_standard("food101", "pretraining")
    assert paths == [str(files / "train" / f"{9 - index}.jpg") for index in range(6)]
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert classes == ["apple", "bread", "cake"]
    assert all(os.path.isfile(path) and not os.path.islink(path) for path in paths)
    monkeypatch.setattr(datasets, "Food101", Untouchable)
    queries, labels, again = open_standard("food101", "queries")
    assert queries == [str(files / "test" / f"{9 - index}.jpg") for index in range(3)]
    assert (labels.tolist(), again) == ([0, 1, 2], classes)
    assert sorted(os.listdir(cache / "sets" / "food101" / "files")) == ["index.json", "set"]


def test_a_relative_cache_gives_absolute_paths(tmp_path, monkeypatch, server):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BINCOMM_CACHE", "here")
    for path in open_standard("food101", "queries")[0]:
        assert path.startswith(f"{tmp_path}/here/sets/food101/")
        assert os.path.isfile(path)


def test_training_takes_the_validation_split_too(monkeypatch):
    monkeypatch.setattr(datasets, "DTD", Unpacked)
    for part in ("pretraining", "gallery"):
        paths, labels, _ = open_standard("dtd", part)
        assert [path.split("/")[-2] for path in paths] == ["train"] * 6 + ["val"] * 3
        assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    paths, _, _ = open_standard("dtd", "queries")
    assert [path.split("/")[-2] for path in paths] == ["test"] * 3


def test_stl10_pretrains_on_images_without_labels_too(monkeypatch):
    class Partly(Pictures):
        def __init__(self, root, split="train", folds=None, download=False):
            super().__init__(root, split != "test", download=download)
            self.split = split

        def __getitem__(self, index):
            picture, label = super().__getitem__(index)
            return picture, -1 if self.split == "unlabeled" else label

    monkeypatch.setattr(datasets, "STL10", Partly)
    paths, labels, classes = open_standard("stl10", "pretraining")
    assert [path.split("/")[-2] for path in paths] == ["train"] * 5 + ["unlabeled"] * 5
    assert labels is None
    assert classes == []
    paths, labels, classes = open_standard("stl10", "gallery")
    assert [path.split("/")[-2] for path in paths] == ["train"] * 5
    assert (labels.tolist(), classes) == ([0, 1, 0, 1, 0], ["cat", "dog"])


def test_without_a_test_split_every_fifth_image_asks(monkeypatch):
    class Whole(Unpacked):
        def __init__(self, root, transform=None, target_transform=None, download=False, loader=None):
            super().__init__(root, "train", download=download, loader=loader)
            self.files *= 2

    monkeypatch.setattr(datasets, "EuroSAT", Whole)
    paths, labels, _ = open_standard("eurosat", "queries")
    assert [os.path.basename(path) for path in paths] == ["5.jpg", "6.jpg"]  # the fifth and the tenth
    assert labels.tolist() == [1, 0]
    paths, labels, _ = open_standard("eurosat", "pretraining")
    assert [os.path.basename(path)[0] for path in paths] == list("9876498754")
    assert labels.tolist() == [0, 1, 2, 0, 2, 0, 1, 2, 1, 2]


def test_names_of_classes(monkeypatch):
    class Numbered(Pictures):
        classes = property()  # asking for it is an AttributeError

        def __init__(self, root, split="train", download=False):
            super().__init__(root, split == "train", download=download)

    class Synonyms(Unpacked):
        classes = (("tench", "Tinca tinca"), ("church",))

        def __init__(self, root, split="train", size="full", download=False, loader=None):
            super().__init__(root, split, download=download, loader=loader)
            assert size == "320px"

    monkeypatch.setattr(datasets, "SVHN", Numbered)
    assert open_standard("svhn", "queries")[2] == list("0123456789")
    monkeypatch.setattr(datasets, "Imagenette", Synonyms)
    assert open_standard("imagenette", "queries")[2] == ["tench", "church"]


def test_splits_that_number_classes_differently_are_an_error(monkeypatch):
    class Odd(Unpacked):
        def __init__(self, root, split="train", download=False, loader=None):
            super().__init__(root, split, download=download, loader=loader)
            self.classes = ["apple", split]

    monkeypatch.setattr(datasets, "DTD", Odd)
    with pytest.raises(ValueError, match="dtd could not be .*different classes"):
        open_standard("dtd", "queries")


@pytest.mark.parametrize("where", [(True, 2), (False, 1)])
def test_an_interruption_leaves_nothing_in_place(cache, monkeypatch, where):
    folder = cache / "sets" / "cifar10"
    monkeypatch.setattr(datasets, "CIFAR10", Pictures)
    monkeypatch.setattr(Pictures, "fail_at", (*where, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        open_standard("cifar10", "pretraining")
    assert not (folder / "files").exists()
    assert not (folder / "unfinished").exists()
    monkeypatch.setattr(Pictures, "fail_at", (*where, OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match="cifar10 could not be .*No space left on device"):
        open_standard("cifar10", "pretraining")
    assert not (folder / "files").exists()
    monkeypatch.setattr(Pictures, "fail_at", None)
    assert len(open_standard("cifar10", "pretraining")[0]) == 5


def test_what_a_killed_process_left_is_not_used(cache, monkeypatch):
    unpacked = cache / "sets" / "food101" / "unfinished" / "set" / "inner"
    unpacked.mkdir(parents=True)
    (unpacked / "half.jpg").write_text("ha")
    monkeypatch.setattr(datasets, "Food101", Unpacked)
    open_standard("food101", "queries")
    files = below(cache / "sets" / "food101" / "files")
    assert len(files) == 10
    assert "set/inner/half.jpg" not in files


def test_two_at_once_make_a_set_once(cache, monkeypatch):
    """Two threads: a file that each of them opens is locked for the other, as between processes."""
    flock, second_waits = fcntl.flock, threading.Event()
    arrived = []

    def announcing_flock(file, operation):
        arrived.append(file)
        if len(arrived) == 2:
            second_waits.set()
        flock(file, operation)

    class Waiting(Pictures):
        def __getitem__(self, index):
            assert second_waits.wait(60)
            return super().__getitem__(index)

    monkeypatch.setattr(fcntl, "flock", announcing_flock)
    monkeypatch.setattr(datasets, "CIFAR10", Waiting)
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda _: open_standard("cifar10", "pretraining")[0], range(2)))
    assert results[0] == results[1]
    assert [os.path.isfile(path) for path in results[0]] == [True] * 5
    assert (cache / CALLS).read_text() == "called\n" * 2  # one for each split
    assert sorted(os.listdir(cache / "sets" / "cifar10")) == ["files", "lock"]


@pytest.mark.parametrize("name", SETS)
def test_without_a_network_the_error_says_what_to_put_where(cache, name):
    with pytest.raises(ValueError) as caught:
        open_standard(name, "pretraining")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"data: {name} could not be fetched")
    assert "no network in tests" in message
    assert f"put {' and '.join(SETS[name].archives)}, " in message
    assert message.endswith(f" into {cache / 'sets' / name}")
    assert (cache / "sets" / name).is_dir()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("File not found or\ncorrupted."),
        urllib.error.HTTPError("http://x", 404, "Not Found", {}, None),
        IncompleteRead(b"", 10),
        EOFError("Compressed file ended"),
        tarfile.ReadError("not a gzip file"),
        zlib.error("invalid block type"),
        TimeoutError(),
    ],
    ids=repr,
)
def test_every_failure_is_one_line(monkeypatch, error):
    monkeypatch.setattr(datasets, "CIFAR10", raising(error))
    with pytest.raises(ValueError) as caught:
        open_standard("cifar10", "queries")
    reason = " ".join(str(error).split()) or "TimeoutError"
    assert f"cifar10 could not be fetched and unpacked ({reason}); " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="cache: cannot write in .*; set BINCOMM_CACHE"):
        open_standard("svhn", "queries")


def test_missing_packages_are_named(monkeypatch):
    error = ModuleNotFoundError("No module named 'scipy'", name="scipy")
    monkeypatch.setattr(datasets, "SVHN", raising(error))
    with pytest.raises(ValueError, match="data: svhn cannot be read without scipy; pip install scipy"):
        open_standard("svhn", "queries")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(
        ValueError, match="data: svhn comes through torchvision, .*; pip install torchvision$"
    ):
        open_standard("svhn", "queries")


@pytest.mark.parametrize("name", SETS)
def test_sets_fit_torchvision(tmp_path, monkeypatch, name):
    standard = SETS[name]
    dataset = getattr(datasets, standard.dataset)
    checked = []  # (file, whether its checksum is known)
    monkeypatch.setattr(urllib.request, "urlopen", raising(AssertionError("checked no file")))
    monkeypatch.setattr(utils, "extract_archive", lambda *args: None)
    monkeypatch.setattr(
        utils, "check_integrity", lambda path, md5=None: checked.append((path, bool(md5))) or True
    )
    for arguments in standard.splits.values():
        inspect.signature(dataset).bind("root", download=True, **arguments)
        with pytest.raises(RuntimeError, match="not found"):  # not a ValueError: there is such a split
            dataset(str(tmp_path), download=False, **arguments)
        with pytest.raises((RuntimeError, FileNotFoundError)):  # nothing was unpacked after all
            dataset(str(tmp_path), download=True, **arguments)
    expected = {str(tmp_path / standard.subfolder / archive) for archive in standard.archives}
    assert set(checked) == {(path, standard.checked) for path in expected}
    names = {split for splits in PARTS.values() for split in splits}
    assert standard.splits.keys() <= names


def packed(path, files):
    """A .tar.gz of files with the given texts, or with anything where the text is empty."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            data = text.encode() or os.urandom(2000)  # which cannot be compressed
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def aircraft(path):
    inside = "fgvc-aircraft-2013b/data"
    texts = {f"{inside}/variants.txt": "A320\nDC-10\n"}
    images = {}
    for number, split in enumerate(("train", "val", "test")):
        texts[f"{inside}/images_variant_{split}.txt"] = f"{number}1 DC-10\n{number}0 A320\n"
        images |= {f"{inside}/images/{number}{label}.jpg": "" for label in (0, 1)}
    packed(path, texts | images)


def food(path):
    splits = {
        "train": '{"pie": ["pie/2", "pie/1"], "egg": ["egg/1"]}',
        "test": '{"egg": ["egg/3"], "pie": []}',
    }
    images = {f"food-101/images/{name}.jpg": "" for name in ("pie/1", "pie/2", "egg/1", "egg/3")}
    packed(path, {f"food-101/meta/{split}.json": text for split, text in splits.items()} | images)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder from which both sets' archives are fetched, and the files that were fetched.

    Whatever the address, a file of that name is fetched from a server on this machine, and a checksum that
    torchvision knows is right for the file that is served.
    """
    folder = tmp_path / "served"
    folder.mkdir()
    aircraft(folder / "fgvc-aircraft-2013b.tar.gz")
    food(folder / "food-101.tar.gz")
    fetched = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            fetched.append(self.path)

    def is_served(path, md5=None):
        return os.path.isfile(path) and (
            md5 is None or filecmp.cmp(path, folder / os.path.basename(path), shallow=False)
        )

    monkeypatch.setattr(utils, "check_integrity", is_served)
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        address = f"http://127.0.0.1:{running.server_port}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
        monkeypatch.setattr(
            urllib.request,
            "urlopen",
            lambda request: opener.open(f"{address}/{os.path.basename(request.full_url)}"),
        )
        yield folder, fetched
        running.shutdown()
        thread.join()


def ends(paths):
    return [path.rpartition("/images/")[2] for path in paths]


def test_archives_put_there_by_hand_are_unpacked_and_stay(cache, server, monkeypatch):
    served, fetched = server
    folder = cache / "sets" / "food101"
    folder.mkdir(parents=True)
    (folder / "food-101.tar.gz").write_bytes((served / "food-101.tar.gz").read_bytes())
    paths, labels, classes = open_standard("food101", "gallery")
    assert fetched == []
    assert (ends(paths), labels.tolist(), classes) == (
        ["pie/2.jpg", "pie/1.jpg", "egg/1.jpg"],
        [1, 1, 0],
        ["egg", "pie"],
    )
    assert [os.path.getsize(path) for path in paths] == [2000] * 3
    assert ends(open_standard("food101", "queries")[0]) == ["egg/3.jpg"]
    assert sorted(os.listdir(folder)) == ["files", "food-101.tar.gz", "lock"]
    assert "set/food-101.tar.gz" not in below(folder / "files")


@pytest.mark.parametrize("name, first", [("food101", "pie/2.jpg"), ("fgvc_aircraft", "01.jpg")])
def test_half_an_archive_is_fetched_again(cache, server, name, first):
    served, fetched = server
    (archive,) = SETS[name].archives
    folder = cache / "sets" / name
    (folder / "fetched").mkdir(parents=True)
    complete = (served / archive).read_bytes()
    (folder / "fetched" / archive).write_bytes(complete[: len(complete) // 2])
    assert ends(open_standard(name, "pretraining")[0])[0] == first
    assert f"/{archive}" in fetched
    assert sorted(os.listdir(folder)) == ["files", "lock"]


def test_half_an_archive_put_there_by_hand_is_an_error(cache, server):
    served, _ = server
    folder = cache / "sets" / "fgvc_aircraft"
    folder.mkdir(parents=True)
    complete = (served / "fgvc-aircraft-2013b.tar.gz").read_bytes()
    (folder / "fgvc-aircraft-2013b.tar.gz").write_bytes(complete[: len(complete) // 2])
    with pytest.raises(ValueError, match="Compressed file ended.*put fgvc-aircraft-2013b.tar.gz, complete"):
        open_standard("fgvc_aircraft", "queries")
    (folder / "fgvc-aircraft-2013b.tar.gz").write_bytes(complete)
    paths, labels, classes = open_standard("fgvc_aircraft", "queries")
    assert (ends(paths), labels.tolist(), classes) == (["21.jpg", "20.jpg"], [1, 0], ["A320", "DC-10"])


def test_a_download_outlives_an_interruption_of_unpacking(cache, server, monkeypatch):
    _, fetched = server
    with monkeypatch.context() as patch:
        patch.setattr(utils, "extract_archive", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            open_standard("food101", "queries")
    assert below(cache / "sets" / "food101") == ["fetched/food-101.tar.gz", "lock"]
    assert "/food-101.tar.gz" in fetched
    fetched.clear()
    assert ends(open_standard("food101", "queries")[0]) == ["egg/3.jpg"]
    assert fetched == []
    assert sorted(os.listdir(cache / "sets" / "food101")) == ["files", "lock"]


def test_pets_are_files(cache, monkeypatch):
    """Of torchvision's own class, whose files are in attributes that it does not document."""

    def unpack(url, download_root, md5):
        folder = os.path.join(download_root, os.path.basename(url).removesuffix(".tar.gz"))
        os.mkdir(folder)
        if folder.endswith("images"):
            for name in ("Bengal_1", "Bengal_2", "great_dane_7", "great_dane_8"):
                Image.new("RGB", (8, 8)).save(os.path.join(folder, f"{name}.jpg"))
        else:
            with open(os.path.join(folder, "trainval.txt"), "w") as file:
                file.write("Bengal_2 1 1 1\ngreat_dane_7 2 2 1\n")
            with open(os.path.join(folder, "test.txt"), "w") as file:
                file.write("Bengal_1 1 1 1\ngreat_dane_8 2 2 1\n")

    monkeypatch.setattr(datasets.oxford_iiit_pet, "download_and_extract_archive", unpack)
    paths, labels, classes = open_standard("oxford_iiit_pet", "gallery")
    assert (ends(paths), labels.tolist()) == (["Bengal_2.jpg", "great_dane_7.jpg"], [0, 1])
    assert classes == ["Bengal", "Great Dane"]
    assert all(path.startswith(f"{cache}/sets/oxford_iiit_pet/files/set/") for path in paths)
    assert all(os.path.isfile(path) for path in paths)
    assert ends(open_standard("oxford_iiit_pet", "queries")[0]) == ["Bengal_1.jpg", "great_dane_8.jpg"]
