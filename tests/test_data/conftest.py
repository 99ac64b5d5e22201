import pytest
from numbered_pictures import write_pictures


@pytest.fixture
def images(tmp_path):
    """23 numbered pictures, the only files in `tmp_path`."""
    return write_pictures(tmp_path, 23)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("BINCOMM_CACHE", str(tmp_path / "cache"))
