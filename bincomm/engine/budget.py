"""The number of steps that fits the key `minutes`, and the batch, from the speed of a few steps."""

import gc
import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bincomm.config import PretrainConfig, read_config
from bincomm.data.sources import Source
from bincomm.distributed.ranks import Ranks
from bincomm.engine.batches import load_views
from bincomm.engine.job import Job, prepare
from bincomm.engine.records import in_short
from bincomm.engine.run import note_config, take_steps
from bincomm.engine.signals import Signals

logger = logging.getLogger(__name__)

MIN_STEPS = 20  # with fewer, a run shows nothing
SMALLEST_BATCH = 16  # in place of which more steps do not help
# The first steps are slow, but have batches that were made in advance, so that slow data does not show.
WARM_UP = 5
AT_LEAST, AT_MOST = 3, 200  # steps that are measured
LONGEST, SHARE = 5.0, 0.05  # how long, in seconds and as a share of the budget, if that is enough steps


def settle_steps(config: PretrainConfig, source: Source, run: Path, ranks: Ranks) -> PretrainConfig:
    """The configuration with the number of steps that its minutes stand for: that in the run's config.yaml,
    so that a resumed run is the same run on a slower machine too, or else one that is chosen now and noted
    there. All ranks call it, after `bincomm.engine.run.begin_run`, and get the same.
    """
    if not config.steps_are_open:
        return config

    def noted() -> dict[str, Any]:
        settled = take_steps(config, read_config(run, "output"))
        return {key: getattr(settled, key) for key in config.open_keys}

    settled = replace(config, **ranks.first(noted))
    if settled.steps_are_open:
        settled = choose_steps(config, source, run, ranks)
        ranks.first(lambda: note_config(run, settled))
    return settled


def choose_steps(config: PretrainConfig, source: Source, run: Path, ranks: Ranks) -> PretrainConfig:
    """The configuration with as many steps as fit its minutes at the speed measured now, and log it."""
    assert config.minutes is not None
    logger.info("measuring the speed of a few steps, to choose how many fit the minutes")
    while True:
        seconds, epoch_steps = measure(config, source, run, ranks)
        gc.collect()  # the networks that were measured make room for those of the run
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        fitting = int(60 * config.minutes / seconds)
        smaller = smaller_batch(config, fitting, ranks.world)
        if smaller == config.batch_size:
            break
        logger.info(
            f"batches of {smaller} in place of {config.batch_size}, of which only {fitting} fit "
            f"(fewest_steps {config.fewest_steps})"
        )
        config = replace(config, batch_size=smaller)
    steps = max(fitting, MIN_STEPS)
    speed = f"{in_short(config.batch_size / seconds)} images/s"
    unit = "minute" if config.minutes == 1 else "minutes"
    logger.info(
        f"{config.minutes:g} {unit} at {speed}: {steps} steps of {config.batch_size}, "
        f"{in_short(steps / epoch_steps)} epochs"
    )
    if fitting < MIN_STEPS:
        logger.warning(
            f"minutes: {config.minutes:g} are too few, because {fitting} steps fit; the run has the fewest "
            f"that are of use, {steps}, and takes about {in_short(steps * seconds / 60)} minutes"
        )
    return replace(config, epochs=math.ceil(steps / epoch_steps), max_steps=steps)


def smaller_batch(config: PretrainConfig, fitting: int, world: int) -> int:
    """The batch of which as many fit as a run needs, by the number of those of the configuration that fit."""
    batch = config.batch_size
    while (
        fitting * config.batch_size < config.fewest_steps * batch
        and batch >= 2 * SMALLEST_BATCH
        and batch % (2 * world * config.accumulate) == 0
    ):
        batch //= 2
    return batch


def measure(config: PretrainConfig, source: Source, run: Path, ranks: Ranks) -> tuple[float, int]:
    """Seconds of a training step, by rank 0's clock, and the number of steps of an epoch. Where the first
    steps have a lower resolution, steps of both are measured, and the seconds are their mean over the run.

    The steps are real ones of a job of their own, of which nothing is kept: the run that follows creates its
    networks from the seed and begins with the first batch, as if nothing had been measured.
    """
    job = Job(config, source, run, ranks, Signals(run))
    torch.backends.cudnn.benchmark = ranks.device.type == "cuda"  # as in the run
    share, epoch_steps = config.low_resolution, job.loader.steps_per_epoch
    if not share:
        return seconds_of_step(job), epoch_steps
    job.loader.resize(*config.low_sizes)
    low = seconds_of_step(job)
    job.loader.resize(config.global_size, config.local_size)
    full = seconds_of_step(job)
    logger.info(
        f"{in_short(config.batch_size / low)} images/s of low resolution, "
        f"{in_short(config.batch_size / full)} of full"
    )
    return share * low + (1 - share) * full, epoch_steps


def seconds_of_step(job: Job) -> float:
    """Seconds of a training step with the crops that the job's loader makes, by rank 0's clock."""
    config, ranks, window = job.config, job.ranks, job.records.window
    on_gpu = ranks.device.type == "cuda"
    train_step = prepare(job.eager_step, config, load_views(job.loader, job.stored))

    def seconds_per_step(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            output = train_step(*load_views(job.loader, job.stored), lr=0.0, weight_decay=0.0, momentum=1.0)
            job.guard.read()
            window.add(output)
            if window.steps == config.log_every:
                window.report()
        if on_gpu:
            torch.cuda.synchronize()
        return ranks.gather((time.perf_counter() - start) / steps)[0]

    seconds_per_step(WARM_UP - 3)
    estimate = seconds_per_step(3)
    longest = LONGEST if config.minutes is None else min(LONGEST, SHARE * 60 * config.minutes)
    wanted = int(longest / estimate)
    return seconds_per_step(min(max(wanted, AT_LEAST), AT_MOST))
