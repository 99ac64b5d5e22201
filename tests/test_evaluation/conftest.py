import logging

import pytest
from tiny_run import OPTIONS


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run with two checkpoints, steps 10 and 20; only to be read."""
    from quick_runs import pages

    from bincomm.pretraining import pretrain

    output = tmp_path_factory.mktemp("runs") / "run"
    with pages():
        pretrain(configuration(output=output))
    return output


@pytest.fixture(scope="session")
def sources():
    """Gallery (1437) and queries (360) of the digits."""
    from bincomm.data.sources import evaluation_sources, open_source

    return evaluation_sources("digits", open_source("digits"))[:2]


@pytest.fixture
def messages(caplog, monkeypatch):
    """The messages that bincomm has logged, whatever a command made of its loggers before."""
    monkeypatch.setattr(logging.getLogger("bincomm"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("bincomm")]


def configuration(**options):
    from bincomm.configuration import configure

    return configure(**(OPTIONS | options))


@pytest.fixture(name="configuration", scope="session")
def _configuration():
    """A function that makes the configuration of such a run, with other options."""
    return configuration
