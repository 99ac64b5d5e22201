import pytest
import yaml
from tiny_run import OPTIONS

from bincomm.cli import main
from bincomm.configuration import configure
from bincomm.dry_run import describe, dry_run
from bincomm.pretraining import pretrain

pytestmark = pytest.mark.slow


def test_it_tells_what_a_run_would_take_and_writes_nothing(tmp_path):
    config = configure(**OPTIONS, output=str(tmp_path / "runs" / "x"))
    forecast = dry_run(config)
    assert (forecast.steps, forecast.images, forecast.state) == (20, 1437, "is new")
    assert forecast.evaluation == "k-NN of 360 queries in 1437 images"
    assert forecast.seconds > 0
    assert forecast.memory_bytes > 2**27
    assert list(tmp_path.iterdir()) == []
    text = describe(forecast)
    assert yaml.safe_load(text) == config.as_dict()
    assert "20 steps of 64" in text
    pretrain(config)
    measured = (tmp_path / "runs/x/checkpoints/step-000000020.ckpt").stat().st_size
    assert 0.5 < measured / forecast.checkpoint_bytes < 2  # the loader's state is in it, too


@pytest.mark.long
def test_a_run_that_is_there_is_told(tmp_path):
    config = configure(**OPTIONS, output=str(tmp_path / "x"))
    pretrain(config)
    assert dry_run(config).state == "holds this run, finished"
    (tmp_path / "x/result.json").unlink()
    assert dry_run(config).state == "holds this run, to be resumed"
    with pytest.raises(ValueError, match="output: .*another configuration .*bits was 20, now 24"):
        dry_run(configure(**OPTIONS | {"bits": 24}, output=str(tmp_path / "x")))


def test_the_steps_that_fit_the_minutes_are_chosen(tmp_path, capsys):
    options = [f"--{key}={value}" for key, value in OPTIONS.items() if key != "max_steps"]
    assert main(["pretrain", "--dry_run", "--minutes=0.05", f"--output={tmp_path / 'x'}", *options]) == 0
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert config["max_steps"] >= 20
    assert f"{config['max_steps']} steps of {config['batch_size']}" in printed
    assert not (tmp_path / "x").exists()


def test_wrong_data_is_told(tmp_path, capsys):
    assert main(["pretrain", "--dry_run", "--data=nowhere", f"--output={tmp_path / 'x'}"]) == 2
    assert "data: 'nowhere' does not exist" in capsys.readouterr().err
