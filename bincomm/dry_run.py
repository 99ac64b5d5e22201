"""What a run would be, without beginning it."""

import resource
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from bincomm.building import create_networks
from bincomm.config import PretrainConfig, read_config
from bincomm.data.sources import evaluation_sources, open_source, why_no_evaluation
from bincomm.distributed.ranks import join_ranks
from bincomm.engine.budget import choose_steps, measure
from bincomm.engine.records import duration, in_short
from bincomm.engine.resolution import Resolution
from bincomm.engine.run import (
    dump_config,
    has_begun,
    is_finished,
    precision_of,
    refuse_differences,
    take_steps,
)
from bincomm.engine.tracking import check_tracker

# Of the parameters in a checkpoint: student and the optimizer's two moments. A moving average is one more.
COPIES = 3


class Forecast(NamedTuple):
    """A run that has not begun."""

    config: PretrainConfig  # with the number of steps that was chosen for its minutes
    images: int
    evaluation: str  # on what, or why there is none
    state: str  # what its directory holds
    steps: int
    seconds: float  # of them all
    memory_bytes: int  # at most in a step, of the GPU, or of this process
    device: str
    checkpoint_bytes: int
    free_bytes: int  # where the run would be written


def dry_run(config: PretrainConfig) -> Forecast | None:
    """Open the data, train for a few steps on its first batches, and tell what the whole run would take;
    nothing is written. All ranks call it, and those after the first return None.

    Raises:
        ValueError: what `bincomm.pretraining.pretrain` would refuse.
    """
    run = Path(config.output)
    check_tracker(config)
    with join_ranks(config.device) as ranks:
        source = ranks.leaders_first(lambda: open_source(config.data))
        labeled = ranks.leaders_first(lambda: evaluation_sources(config.data, source))
        state = "is new"
        if ranks.first(lambda: has_begun(run)):
            stored = ranks.first(lambda: read_config(run, "output"))
            config = replace(config, precision=precision_of(run, config))
            refuse_differences(config, stored, str(run))
            config = take_steps(config, stored)
            state = "holds this run, finished" if is_finished(run) else "holds this run, to be resumed"
        with tempfile.TemporaryDirectory() as folder:
            if config.steps_are_open:
                config = choose_steps(config, source, Path(folder), ranks)
            seconds, epoch_steps = measure(config, source, Path(folder), ranks)
        ranks.leave()
        if ranks.rank:
            return None
        on_gpu = ranks.device.type == "cuda"
        of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # it is in KiB
        student, _ = create_networks(config, torch.device("meta"))
        existing = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
        steps = config.steps(epoch_steps)
        if labeled is None:
            evaluation = f"no k-NN: {why_no_evaluation(config.data, source)}"
        else:
            gallery, queries, _ = labeled
            evaluation = f"k-NN of {len(queries.images)} queries in {len(gallery.images)} images"
        return Forecast(
            config,
            len(source.images),
            evaluation,
            state,
            steps,
            steps * seconds,
            torch.cuda.max_memory_allocated() if on_gpu else of_process,
            torch.cuda.get_device_name() if on_gpu else "CPU",
            4 * (COPIES + (not config.teacher_is_frozen)) * sum(p.numel() for p in student.parameters()),
            shutil.disk_usage(existing).free,
        )


def describe(forecast: Forecast) -> str:
    """The configuration, as it would be in config.yaml, and the rest as its comments."""
    config = forecast.config
    per_second = forecast.steps * config.batch_size / forecast.seconds
    disk = config.keep * forecast.checkpoint_bytes
    resolution = Resolution(config, forecast.steps)
    lines = [
        f"{config.output} {forecast.state}; nothing was written",
        f"{forecast.images} images; at the end {forecast.evaluation}",
        f"{forecast.steps} steps of {config.batch_size}, about {duration(forecast.seconds)}, at "
        f"{in_short(per_second)} images/s on {forecast.device}",
        *([resolution.describe()] if resolution.low_steps else []),
        f"{size(forecast.memory_bytes)} of memory, about {size(disk)} of disk for {config.keep} checkpoints, "
        f"of {size(forecast.free_bytes)} that are free",
    ]
    return dump_config(config) + "\n" + "\n".join(f"# {line}" for line in lines)


def size(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
