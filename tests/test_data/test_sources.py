import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from bincomm.data.digits import digits
from bincomm.data.sources import Source, evaluation_sources, open_source, why_no_evaluation
from bincomm.distributed.ranks import ALONE
from bincomm.engine.lock import open_run


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".txt", ".csv", ""):
            path.write_text("x")
        else:
            Image.new("RGB", (8, 8)).save(path)
    return str(root)


def names(source, root):
    return [os.path.relpath(file, root) for file in source.images.names()]


def paths(source):
    return list(source.images.names())


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_flat_folder_has_no_labels(tmp_path):
    source = open_source(make(tmp_path, "b.png", "a.JPG", "c.webp", "note.txt", ".hidden.png"))
    assert names(source, tmp_path) == ["a.JPG", "b.png", "c.webp"]
    assert source.labels is None
    assert evaluation_sources(str(tmp_path), source) is None


def test_nested_folder_is_labeled_by_its_first_level(tmp_path):
    source = open_source(make(tmp_path, "dog/x/2.png", "cat/1.png", "dog/1.png", ".git/3.png"))
    assert names(source, tmp_path) == ["cat/1.png", "dog/1.png", "dog/x/2.png"]
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [0, 1, 1]


def test_images_beside_folders_or_one_folder_alone_are_no_classes(tmp_path):
    assert open_source(make(tmp_path / "a", "cat/1.png", "dog/1.png", "2.png")).labels is None
    assert open_source(make(tmp_path / "b", "all/1.png", "all/2.png")).labels is None


def test_links_are_followed_but_not_in_circles(tmp_path):
    make(tmp_path / "elsewhere", "1.png")
    make(tmp_path / "root", "cat/0.png")
    (tmp_path / "root" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "cat" / "up").symlink_to(tmp_path / "root")
    source = open_source(str(tmp_path / "root"))
    assert names(source, tmp_path / "root") == ["cat/0.png", "dog/1.png"]


def test_train_and_test_folders(tmp_path):
    make(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/cat/2.png", "test/dog/3.png", "test/dog/4.png")
    source = open_source(str(tmp_path))
    assert names(source, tmp_path) == ["train/cat/1.png", "train/dog/1.png"]
    gallery, queries, held_out = evaluation_sources(str(tmp_path), source)
    assert held_out
    assert names(queries, tmp_path) == ["test/cat/2.png", "test/dog/3.png", "test/dog/4.png"]
    assert gallery.labels.tolist() == [0, 1]
    make(tmp_path, "train/ant/0.png", "train/horse/1.png")  # of which there are no queries
    source = open_source(str(tmp_path))
    gallery, queries, _ = evaluation_sources(str(tmp_path), source)
    assert gallery.classes == queries.classes == ["ant", "cat", "dog", "horse"]
    assert queries.labels.tolist() == [1, 2, 2]
    make(tmp_path, "test/zebra/9.png")
    with pytest.raises(ValueError, match="data: expected only classes of .*train in .*test, got also zebra"):
        evaluation_sources(str(tmp_path), source)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train", "valid"),
        ("train", "validation"),
        ("Train", "Test"),
        ("training", "testing"),
        ("TRAIN", "val"),
    ],
)
def test_the_usual_names_of_parts_are_no_classes(tmp_path, train, held_out):
    make(tmp_path, *(f"{part}/{name}/{part}.png" for part in (train, held_out) for name in ("cat", "dog")))
    source = open_source(str(tmp_path))
    assert names(source, tmp_path) == [f"{train}/cat/{train}.png", f"{train}/dog/{train}.png"]
    assert source.classes == ["cat", "dog"]
    assert source.about_split == (
        f"the images are those of {train}; those of {held_out} are held out for evaluation"
    )
    _, queries, is_held_out = evaluation_sources(str(tmp_path), source)
    assert is_held_out
    assert names(queries, tmp_path) == [f"{held_out}/cat/{held_out}.png", f"{held_out}/dog/{held_out}.png"]
    make(tmp_path, f"{held_out.swapcase()}/cat/1.png")
    with pytest.raises(ValueError, match=f"data: expected one of .*{held_out}.* names of the same part"):
        open_source(str(tmp_path))


def test_all_parts_of_a_folder_or_one(tmp_path):
    make(tmp_path, *(f"{part}/{name}/{part}.png" for part in ("train", "valid") for name in ("cat", "dog")))
    source = open_source(str(tmp_path), "all")
    assert names(source, tmp_path) == [
        "train/cat/train.png",
        "train/dog/train.png",
        "valid/cat/valid.png",
        "valid/dog/valid.png",
    ]
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [0, 1, 0, 1]
    assert [source.parts.name(image) for image in range(4)] == ["train", "train", "valid", "valid"]
    assert source.about_split == "the images are those of all parts, train and valid; --split takes one"
    assert names(open_source(str(tmp_path), "val"), tmp_path) == [
        "valid/cat/valid.png",
        "valid/dog/valid.png",
    ]
    assert open_source(str(tmp_path), "train").about_split == "the images are those of train"
    with pytest.raises(ValueError, match=f"split: expected train or val in {tmp_path}, got test"):
        open_source(str(tmp_path), "test")
    with pytest.raises(ValueError, match="split: expected no split, because there are no such parts, in"):
        open_source(str(tmp_path / "train"), "val")


def test_a_folder_of_train_alone_has_its_classes(tmp_path):
    source = open_source(make(tmp_path, *(f"Train/{name}/{i}.png" for name in ("a", "b") for i in range(5))))
    assert source.classes == ["a", "b"]
    _, queries, held_out = evaluation_sources(str(tmp_path), source)
    assert not held_out
    assert names(queries, tmp_path) == ["Train/a/4.png", "Train/b/4.png"]


def test_a_list_has_the_classes_and_parts_of_its_folders(tmp_path):
    files = [f"x/{part}/{name}/{i}.png" for part in ("train", "val") for name in ("a", "b") for i in range(5)]
    make(tmp_path, *files)
    (tmp_path / "train.txt").write_text("\n".join(files[:10]))
    source = open_source(str(tmp_path / "train.txt"))
    assert source.classes == ["a", "b"]
    assert evaluation_sources(str(tmp_path / "train.txt"), source)[2] is False
    (tmp_path / "all.txt").write_text("\n".join(files))
    source = open_source(str(tmp_path / "all.txt"))
    assert names(source, tmp_path) == files[:10]
    _, queries, held_out = evaluation_sources(str(tmp_path / "all.txt"), source)
    assert held_out
    assert names(queries, tmp_path) == files[10:]


def test_why_there_is_no_evaluation(tmp_path):
    make(tmp_path, "a/1.png", "b/cat/1.png", "b/dog/1.png")
    for data, reason in (
        (str(tmp_path / "a"), "not every image lies in a folder named after a class"),
        (str(tmp_path / "b"), "no class has 5 images"),
        (
            {str(tmp_path / "a"): 1, str(tmp_path / "b"): 1},
            "the data is a mix of sources; `bincomm",
        ),
    ):
        source = open_source(data)
        assert evaluation_sources(data, source) is None
        assert why_no_evaluation(data, source).startswith(reason)


def test_a_list_names_files_below_its_folder_unless_another_is_given(tmp_path):
    elsewhere = make(tmp_path / "elsewhere", "1.png")
    make(tmp_path / "lists", "0.png", "x/0.png")
    path = tmp_path / "lists" / "list.txt"
    for line in (f"{elsewhere}/1.png", "../elsewhere/1.png", "x/../../elsewhere/1.png"):
        path.write_text(f"0.png\n{line}\n")
        with pytest.raises(
            ValueError, match=f"1 files that do not lie in {tmp_path}/lists/, such as .*{path}@{tmp_path}$"
        ):
            open_source(str(path))
        for root in (tmp_path, "..", "/", ""):
            assert len(open_source(f"{path}@{root}").images) == 2
    path.write_text(f"{tmp_path}/lists/0.png\n./../lists/0.png\n")  # these lie in it
    assert len(open_source(str(path)).images) == 2


def test_names_in_errors_are_one_line_without_control_characters(tmp_path):
    bad = "x\nbincomm: all is well\x1b[2J"
    for part in ("train/cat", "train/dog", f"val/{bad}", "val/cat"):
        make(tmp_path / "in", f"{part}/1.png")
    with pytest.raises(ValueError, match="got also x") as error:
        evaluation_sources(str(tmp_path / "in"), open_source(str(tmp_path / "in")))
    (tmp_path / "list.txt").write_text("x\x1b[2J.png")
    with pytest.raises(ValueError, match="do not exist") as listed:
        open_source(str(tmp_path / "list.txt"))
    (tmp_path / bad).mkdir()
    (tmp_path / bad / "1.tar").write_bytes(b"no tar file at all" * 100)
    with pytest.raises(ValueError, match="no uncompressed tar file") as shard:
        open_source(str(tmp_path / bad))
    for told in (error, listed, shard):
        assert str(told.value).isprintable()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("x.zip", "does not exist, and is an archive: unpack it"),
        ("there.ZIP", "there.ZIP' is an archive: unpack it"),
        ("x.tar.gz", "is a compressed tar file: unpack it"),
        ("x.npz", "is a file of arrays: .*PIL.Image.fromarray"),
        ("x.arrow", "is a table"),
        ("x.jpg", "is one image: give its folder"),
        ("user/name", "give hf://datasets/user/name for .*hf download"),
        ("cifar11", "does not exist; .*did you mean cifar10?"),
    ],
)
def test_what_is_no_source_says_how_to_get_there(tmp_path, monkeypatch, data, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.ZIP").write_text("x")
    with pytest.raises(ValueError, match=f"data: .*{words}") as error:
        open_source(data)
    assert (
        "expected a folder of images, tar or Parquet shards, a .txt file of paths, digits, or one of"
        in str(error.value)
    )


def test_validation_goes_before_test(tmp_path):
    make(tmp_path, *(f"{part}/{name}/{part}.png" for part in ("train", "valid", "test") for name in "ab"))
    _, queries, _ = evaluation_sources(str(tmp_path), open_source(str(tmp_path)))
    assert names(queries, tmp_path) == ["valid/a/valid.png", "valid/b/valid.png"]


def test_a_test_folder_without_labels_asks_nothing(tmp_path):
    make(tmp_path, *(f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(5)), "test/1.png")
    source = open_source(str(tmp_path))
    gallery, queries, held_out = evaluation_sources(str(tmp_path), source)
    assert not held_out
    assert sorted(paths(gallery) + paths(queries)) == paths(source)


def test_a_run_among_the_images_is_no_data(tmp_path):
    make(tmp_path, "cat/1.png", "dog/1.png")
    with open_run(str(tmp_path / "runs" / "first"), ALONE):
        make(tmp_path, "runs/first/curves.png")
        source = open_source(str(tmp_path))
    assert names(source, tmp_path) == ["cat/1.png", "dog/1.png"]
    assert source.classes == ["cat", "dog"]


def test_every_fifth_image_of_a_class_asks(tmp_path):
    make(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(11)))
    source = open_source(str(tmp_path))
    gallery, queries, held_out = evaluation_sources(str(tmp_path), source)
    assert not held_out
    # In the order of their names: 0, 1, 10, 2, 3, ...
    assert names(queries, tmp_path) == ["cat/3.png", "cat/8.png", "dog/3.png", "dog/8.png"]
    assert sorted(paths(gallery) + paths(queries)) == paths(source)
    assert queries.labels.tolist() == [0, 0, 1, 1]


def test_text_list(tmp_path):
    make(tmp_path, "sub/1.png", "2.png")
    (tmp_path / "list.txt").write_text(f"sub/1.png\n\n# not this\n{tmp_path}/2.png\n")
    source = open_source(str(tmp_path / "list.txt"))
    assert names(source, tmp_path) == ["sub/1.png", "2.png"]
    assert source.labels is None
    odd = os.fsdecode(b"caf\xe9\xc2\x85.png")  # not UTF-8, and a line's end to some
    make(tmp_path, odd)
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf2.png\r\n" + os.fsencode(odd) + b"\r\n")
    assert names(open_source(str(tmp_path / "list.txt")), tmp_path) == ["2.png", odd]
    (tmp_path / "list.txt").write_text("sub/1.png\nsub/3.png\nsub/4.png\n")
    with pytest.raises(ValueError, match=r"do not exist: .*sub/3\.png and 1 more"):
        open_source(str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="lists no files"):
        open_source(str(tmp_path / "list.txt"))


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(ValueError, match="data: .*nowhere' does not exist; expected a folder"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="data: '' does not exist"):
        open_source("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data: .*empty holds no images .*but nothing, it is empty"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"data: .*2 × \.txt, 1 × \.csv"):
        open_source(make(tmp_path / "texts", "a.txt", "b/c.txt", "d.csv"))
    with pytest.raises(ValueError, match=r"data: .*a\.txt lists files that do not exist"):
        open_source(str(tmp_path / "texts" / "a.txt"))
    with pytest.raises(ValueError, match=r"data: .*d\.csv' is a table: write its images"):
        open_source(str(tmp_path / "texts" / "d.csv"))


@pytest.mark.slow
def test_digits_are_written_once_and_completely(tmp_path, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path))
    start, make_temporary = threading.Barrier(2, timeout=60), tempfile.mkdtemp

    def wait_for_the_other(**options):  # neither has found the folder before both have begun to write it
        start.wait()
        return make_temporary(**options)

    monkeypatch.setattr(tempfile, "mkdtemp", wait_for_the_other)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: digits(), range(2)))
    assert folders == [tmp_path / "digits"] * 2
    assert os.listdir(tmp_path) == ["digits"]
    source = open_source("digits")
    gallery, queries, held_out = evaluation_sources("digits", source)
    assert held_out
    assert [len(part.images) for part in (source, gallery, queries)] == [1437, 1437, 360]
    assert source.classes == list("0123456789")
    with Image.open(source.images.name(0)) as image:
        assert image.size == (8, 8)
        assert image.getextrema()[1] > 200
    first = os.stat(source.images.name(0)).st_mtime_ns
    digits()
    assert os.stat(source.images.name(0)).st_mtime_ns == first


def test_images_are_selected_from_whatever_can_select_but_not_from_a_mix(tmp_path):
    class Letters:
        """Images of a class that the package does not know."""

        def __init__(self, letters):
            self.letters = letters

        def __len__(self):
            return len(self.letters)

        def name(self, index):
            return self.letters[index]

        def names(self):
            return iter(self.letters)

        def read(self, index):
            raise NotImplementedError

        def select(self, indices):
            return Letters([self.letters[index] for index in indices])

    assert list(Source(Letters("abcd")).select([2, 0]).images.names()) == ["c", "a"]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    mix = open_source({str(tmp_path / "a"): 1, str(tmp_path / "b"): 1})
    with pytest.raises(TypeError, match="source: expected images of one source, got a mix"):
        mix.select([0])
