import pytest
from numbered_pictures import write_pictures


@pytest.fixture
def images(tmp_path):
    """23 numbered pictures, the only files in `tmp_path`."""
    return write_pictures(tmp_path, 23)
