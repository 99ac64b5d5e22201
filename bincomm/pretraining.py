"""Pretraining by discrete communication: the loop. `examples/minimal.py` is the method in one file."""

import logging
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bincomm.building import create_trained
from bincomm.config import PretrainConfig
from bincomm.data.loader import TooManyUnusableError
from bincomm.data.sources import Source, evaluation_sources, open_source, why_no_evaluation
from bincomm.distributed.ranks import Ranks, join_ranks
from bincomm.distributed.sharding import gather_tensors
from bincomm.engine.budget import settle_steps
from bincomm.engine.curves import plot_curves
from bincomm.engine.export import export_backbone
from bincomm.engine.guard import TrainingError
from bincomm.engine.job import Job
from bincomm.engine.lock import open_run
from bincomm.engine.run import begin_run, precision_of, read_result
from bincomm.engine.signals import Interrupted, Signals
from bincomm.engine.tracking import check_tracker
from bincomm.evaluation.model_card import write_model_card
from bincomm.evaluation.pretrained import Pretrained
from bincomm.evaluation.progress import ProgressEvaluation
from bincomm.evaluation.report import report_run
from bincomm.evaluation.run import accuracies, evaluate_run
from bincomm.files import check_folder, write_json
from bincomm.networks import Network

__all__ = ["Interrupted", "TooManyUnusableError", "TrainingError", "pretrain", "train"]

logger = logging.getLogger(__name__)


def pretrain(config: PretrainConfig) -> dict[str, Any] | None:
    """Pretrain a backbone, or continue the run in `config.output`, to the end; returns what result.json
    holds. Where there are several ranks all call it, and those after the first return None.

    Raises:
        ValueError: the configuration, the data or the run's directory does not allow it; the message names
            the key.
        TrainingError: the loss or its gradient was not finite in several steps in a row.
        TooManyUnusableError: more images than `config.max_unusable` allows cannot be used.
        Interrupted: SIGINT or another signal that ends processes came; the run is saved.
        OSError: a result file could not be written.
    """
    if isinstance(config.data, str) and os.path.realpath(config.output) == os.path.realpath(config.data):
        raise ValueError(f"output: expected another folder than that of the images, got {config.output}")
    check_tracker(config)
    with join_ranks(config.device) as ranks:
        ranks.first(lambda: check_folder("output", config.output))
        source = ranks.leaders_first(lambda: open_source(config.data))
        labeled = ranks.leaders_first(lambda: evaluation_sources(config.data, source))
        with open_run(config.output, ranks) as run:
            # The same on all ranks, and on another machine that a run goes on on.
            config = replace(config, precision=ranks.first(partial(precision_of, run, config)))
            if ranks.first(lambda: begin_run(run, config)):
                logger.info("%s holds a finished run", run)
                return None if ranks.rank else read_result(run)
            config = settle_steps(config, source, run, ranks)
            with Signals(run) as signals:
                evaluation = None
                if config.evaluate_every and labeled is not None:
                    evaluation = ProgressEvaluation(*labeled[:2], config, ranks)
                elif config.evaluate_every:
                    logger.warning("evaluate_every: no k-NN: %s", why_no_evaluation(config.data, source))
                try:
                    network = train(config, source, run, ranks, signals, evaluation)
                except Interrupted:
                    if ranks.rank == 0:
                        report_run(run, config, source)
                    raise
                ranks.leave()  # the rest is rank 0's work, and the others need not wait for it
                if ranks.rank or network is None:
                    return None
                export_backbone(network, config, run)
                result = evaluate_run(network, labeled, config, run, ranks.device)
                if labeled is None:
                    result["no_evaluation"] = why_no_evaluation(config.data, source)
                plot_curves(run, accuracies(result))
                write_model_card(run, config, len(source.images), result)
                write_json(run / "result.json", result)  # the run is finished
                report_run(run, config, source, result, Pretrained.of(network, config, ranks.device), labeled)
                return result


def train(
    config: PretrainConfig,
    source: Source,
    run: Path,
    ranks: Ranks,
    signals: Signals,
    evaluation: ProgressEvaluation | None = None,
) -> Network | None:
    """Train, or continue from the newest checkpoint; returns what the run is for, to rank 0 at least: the
    teacher, which is the moving average, or with a frozen teacher the student.

    Raises:
        Interrupted: a signal came; the run is saved.
        Other errors are those of `pretrain`.
    """
    job = Job(config, source, run, ranks, signals)
    step = job.resume()
    with signals.deferred(), job.running(step):
        while step < job.steps:
            job.set_resolution(step)
            if job.schedule.resets_head(step):
                job.reset_head(step)
            job.freeze(step)
            views = job.next_batch(step)
            hyperparameters = job.schedule(step)  # learning rate, weight decay, momentum
            # message → logits → loss → gradient → AdamW → moving average
            output = job.train_step(*views, **hyperparameters)
            step += 1  # from here on the number of steps done
            job.check_finite(step)  # raises, with evidence, after several steps that are not
            job.records.add(step, output, hyperparameters, job.batches.waited)
            if evaluation is not None and job.should_evaluate(step):
                job.records.add_evaluation(step, partial(evaluation, job.trained))
            stop = job.should_stop()
            if stop or job.should_save(step):
                job.state.save(step)
            if stop:
                break
        job.end(step)
    if not config.fsdp:
        return job.trained
    weights = gather_tensors(job.trained.state_dict(), keep=ranks.rank == 0)
    del job  # the shards of the parameters make room for the complete network
    return create_trained(config, weights, ranks.device) if ranks.rank == 0 else None
