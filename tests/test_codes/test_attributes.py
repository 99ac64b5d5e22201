import numpy as np
import pytest

from bincomm.codes.attributes import as_attribute, read_attributes

IMAGES = ["/data/x/000.png", "/data/x/same.png", "/data/y/same.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\na.png\n", "at least one more"),
        ("", "at least one more"),
        ("file,a,a\n000.png,1,2\n", "two columns of the same name"),
        ("file,a\n000.png,1,2\n", "line 2 .* has 3 fields"),
        ('file,a\n100.png,"1\n2"\n\n000.png,1\n./000.png,1\n', "line 6 .* second of its image"),
        ("000.png,1\n100.png,2\n", "begins with an image, '000.png'"),
        ('file,a\n"' + "a" * 200_000, "cannot be read as CSV"),
        (None, "cannot be read as CSV: No such file"),
        ("file,a\nother.png,1\n", "names none of the images"),
        ("file,a\nsame.png,1\n", "names 2 images"),
    ],
)
def test_attributes_that_do_not_fit(tmp_path, text, message):
    if text is not None:
        (tmp_path / "attributes.csv").write_text(text)
    with pytest.raises(ValueError, match=f"attributes: .*{message}"):
        read_attributes(tmp_path / "attributes.csv", IMAGES)


@pytest.mark.parametrize("most", [0, 100])
def test_numbers_of_which_most_are_the_least_or_the_largest_are_divided_beside_these(most):
    numbers = [str(number) for number in range(1, 41)]
    attribute = as_attribute([str(most)] * 60 + numbers + ["", "nan"])
    assert np.bincount(attribute.values + 1).tolist() == ([2, 60, 40] if most == 0 else [2, 40, 60])
    assert attribute.names == (["≤ 0", "> 0"] if most == 0 else ["< 100", "≥ 100"])
