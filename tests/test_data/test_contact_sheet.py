import re

import numpy as np
import pytest
import torch
from PIL import Image

from bincomm import cli
from bincomm.configuration import configure
from bincomm.data.contact_sheet import GAP, LABEL, MIN_WIDTH, TITLE, contact_sheet
from bincomm.data.crops import Crops
from bincomm.data.loader import Loader
from bincomm.data.sources import open_source

MEAN, STD = (255 * np.array(values, np.float32) for values in (Crops.mean, Crops.std))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_it_shows_the_first_batch_of_a_run():
    config = configure("digits", seed=3, jitter=[0.4, 0.4, 0, 0], blur=[1, 0, 0])
    sheet, names = contact_sheet(open_source("digits"), {"": config.crops}, seed=3, images=5)
    source = open_source("digits")
    loader = Loader(source, config.crops, batch_size=config.batch_size, seed=3, device=torch.device("cpu"))
    globals_, locals_ = loader.next()
    assert names == [source.images.name(index) for index in loader.indices[:5]]
    pixels = np.asarray(sheet).astype(float)
    for row in range(5):
        top = TITLE + GAP + row * (24 + GAP)
        for column, crop in enumerate([*globals_[row], *locals_[row]]):
            left = GAP + column * (MIN_WIDTH + GAP)
            side = crop.shape[-1]
            expected = crop.permute(1, 2, 0).numpy() * STD + MEAN
            result = pixels[top : top + side, left : left + side]
            assert np.abs(result - expected.clip(0, 255)).max() < 0.6


def test_on_the_command_line(tmp_path, capsys):
    options = ["--recipe", "digits", "--images", "2", "--sheet", str(tmp_path / "sheet.png")]
    assert cli.main(["data", "look", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "recipe digits, data digits"
    assert len(lines) == 4
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * MIN_WIDTH + 5 * GAP, TITLE + GAP + 2 * (24 + GAP))
    assert cli.main(["data", "look", "--recipe", "digits", "--sheet", str(tmp_path / "no" / "x.png")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


@pytest.mark.slow
def test_presets_side_by_side(tmp_path, capsys):
    """An image has a row for each preset, as the sheet of that preset alone shows it."""
    sheets = {}
    for names in ("all", "plants", "photos,plants"):
        options = ["--recipe=digits", "--images=2", f"--augment={names}", f"--sheet={tmp_path / 'sheet.png'}"]
        assert cli.main(["data", "look", *options]) == 0
        with Image.open(tmp_path / "sheet.png") as sheet:
            sheets[names] = np.asarray(sheet)
    assert capsys.readouterr().out.endswith(", each a row for photos, plants\n")
    width = sheets["plants"].shape[1]
    assert sheets["photos,plants"].shape == (TITLE + GAP + 4 * (24 + GAP), LABEL + width, 3)
    assert sheets["all"].shape == (TITLE + GAP + 12 * (24 + GAP), LABEL + width, 3)
    row = slice(
        TITLE + GAP + 24 + GAP, TITLE + GAP + 24 + GAP + 24
    )  # the second: the first image's other one
    np.testing.assert_array_equal(sheets["photos,plants"][row, LABEL:], sheets["plants"][TITLE + GAP :][:24])
    assert (sheets["photos,plants"][row, :LABEL] < 128).any()  # its label


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            "overhaed",
            "augment: expected all or some of photos, overhead, .*, got 'overhaed'; did you mean over",
        ),
        ("photos,all", "got 'all'"),
        ("", "got ''"),
    ],
)
def test_an_unknown_preset_is_named(names, words, capsys):
    assert cli.main(["data", "look", "--recipe", "digits", "--augment", names]) == 2
    assert re.search(words, capsys.readouterr().err)
