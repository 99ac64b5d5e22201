"""Everything that a run consists of, put together from its configuration."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from bincomm.building import create_networks, create_objective, hash_seed
from bincomm.config import PretrainConfig
from bincomm.data.loader import Loader, TooManyUnusableError
from bincomm.data.remote import UnreachableError
from bincomm.data.sources import Source
from bincomm.dense import DenseNetwork
from bincomm.distributed.ranks import FirstRankError, Ranks
from bincomm.distributed.sharding import load_sharded, load_sharded_optimizer, shard
from bincomm.engine.accumulation import AccumulatedStep, has_batch_norm
from bincomm.engine.batches import Batches, Views
from bincomm.engine.checkpoints import Checkpoints
from bincomm.engine.collapse import create_monitor
from bincomm.engine.compiling import compile_networks
from bincomm.engine.cuda_graph import CapturedStep
from bincomm.engine.evidence import keep_evidence
from bincomm.engine.frozen_teacher import FrozenTeacher, choose_codes
from bincomm.engine.guard import TOTAL, Guard, TrainingError, Verdict
from bincomm.engine.masks import Masks
from bincomm.engine.metrics import MetricsWindow
from bincomm.engine.optimizer import create_optimizer, freeze_backbone, freeze_last_layer
from bincomm.engine.records import Records
from bincomm.engine.reset import reset_head
from bincomm.engine.schedules import Schedule
from bincomm.engine.signals import Interrupted, Signals
from bincomm.engine.state import LoaderPart, Part, RandomPart, Replicated, RunState, WindowPart
from bincomm.engine.step import Step
from bincomm.engine.stored_messages import StoredMessages, check_messages
from bincomm.engine.unusable import UnusableImages
from bincomm.networks import Network

logger = logging.getLogger(__name__)


class Job:
    """A run's parts, and the steps of the loop in `bincomm.pretraining.train`; see there for their order.

    Args:
        source: the images.
        run: the run's directory.
        signals: ask for the end.

    Raises:
        ValueError: the configuration does not fit the number of ranks or the data; the message names the key.
    """

    def __init__(self, config: PretrainConfig, source: Source, run: Path, ranks: Ranks, signals: Signals):
        ranks.first(lambda: check_ranks(config, ranks))
        self.config, self.source, self.run, self.ranks, self.signals = config, source, run, ranks, signals
        self.loader = create_loader(config, source, ranks)
        # With FSDP the complete networks may not fit on one GPU, so they are built on the CPU.
        student, follower = create_networks(config, torch.device("cpu") if config.fsdp else ranks.device)
        if ranks.world > 1 and ranks.device.type == "cuda":  # there is no such batch norm for CPUs
            student, follower = convert_sync_batchnorm(student), convert_sync_batchnorm(follower)
        self.schedule = Schedule(config, self.loader.steps_per_epoch, student.head.features)
        self.steps = self.schedule.steps
        objective = create_objective(config).to(ranks.device)
        if config.fsdp:
            for network in (student,) if config.teacher_is_frozen else (student, follower):
                shard(network, ranks)
        self.sender = create_sender(config, source, follower, ranks)
        optimizer = create_optimizer(student, backbone_apart=self.schedule.frozen > 0)
        teacher = None if isinstance(self.sender, StoredMessages) else self.sender
        step = create_step(config, student, teacher, objective, optimizer, rank=ranks.rank)
        self.student, self.optimizer = student, optimizer
        # What the run is for: the average of its students, but under a frozen teacher the student itself.
        self.trained = student if config.teacher_is_frozen else follower
        self.eager_step, self.guard = step, step.guard
        self.train_step: Step | CapturedStep = step  # what a step of the loop calls
        self.stored = self.sender if isinstance(self.sender, StoredMessages) else None
        unusable = UnusableImages(self.loader, run, ranks)
        self.batches = Batches(self.loader, unusable, self.guard.lag + 1, self.stored)
        bits = config.bits if objective.outputs_are_bits else None
        window = MetricsWindow(
            config.log_every,
            objective.scalars,
            bits,
            ranks.device,
            objective.predicts_bits,
            patches=step.masks is not None,
        )
        monitor = create_monitor(config)
        self.records = Records(config, run, self.schedule, window, monitor, ranks)
        parts: dict[str, Part] = {
            "student": Replicated(student.state_dict, partial(load_sharded, student)),
            "teacher": part_of(self.sender),
            "objective": Replicated(objective.state_dict, partial(load_sharded, objective)),
            "optimizer": Replicated(optimizer.state_dict, partial(load_sharded_optimizer, optimizer)),
            "guard": Replicated(self.guard.state_dict, self.guard.load_state_dict),
            "monitor": Replicated(monitor.state_dict, monitor.load_state_dict),
            "loader": LoaderPart(self.loader),
            "window": WindowPart(window),
            "random": RandomPart(config.seed),
        }
        if step.masks is not None:
            parts["masks"] = Replicated(step.masks.state_dict, step.masks.load_state_dict)
        self.checkpoints = Checkpoints(run / "checkpoints", config.keep)
        self.state = RunState(config, parts, self.checkpoints, ranks)
        self.verdict = Verdict(0, 0, False)  # of the guard, on the last step it has read

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one, and say so; returns the number of steps done."""
        steps_done = self.state.resume()
        if steps_done == 0 and self.ranks.rank:
            # The networks are the same on all ranks, the paths dropped in them are not.
            torch.manual_seed(hash_seed(self.config.seed, -self.ranks.rank))
        if steps_done == 0 and isinstance(self.sender, FrozenTeacher):
            choose_codes(self.sender, self.config, self.source, self.ranks)
        self.verdict = Verdict(int(self.guard.counts[TOTAL]), 0, False)
        self.batches.unusable.resume()
        announce(self, steps_done)
        return steps_done

    @contextmanager
    def running(self, steps_done: int) -> Iterator[None]:
        """Compile what the configuration asks for, open the records, and close them at the end."""
        if self.ranks.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # shapes change once at most
        try:
            if steps_done < self.steps:
                self.loader.resize(*self.schedule.resolution(steps_done))
                self.prepare(steps_done)
            self.records.start(steps_done)
            yield
        finally:
            self.checkpoints.wait()
            self.records.close()

    def prepare(self, step: int) -> None:
        """Compile and capture what the configuration asks for, for crops of the size that this step has."""
        self.train_step = self.eager_step  # what was captured before makes room
        self.train_step = prepare(self.eager_step, self.config, self.next_batch(step, peek=True))

    def set_resolution(self, step: int) -> None:
        """Make crops of the size that the schedule gives this step."""
        if self.loader.resize(*self.schedule.resolution(step)):
            logger.info("step %d of %d: crops have their full size from here on", step, self.steps)
            with self.records.paused():
                self.prepare(step)

    def reset_head(self, step: int) -> None:
        """Re-initialize the head, by the seed and the epoch that begins."""
        seed = (self.config.seed, self.schedule.epoch(step))
        reset_head(self.student, self.trained, self.optimizer, seed)

    def freeze(self, step: int) -> None:
        """Freeze DINO's prototypes and the backbone in as many first epochs as the configuration says."""
        freeze_last_layer(self.optimizer, self.schedule.epoch(step) < self.config.freeze_last_layer)
        freeze_backbone(self.optimizer, step < self.schedule.frozen)

    def next_batch(self, step: int, peek: bool = False) -> Views:
        """The crops of step `step`, which counts from 0; see `Batches.next`.

        Raises:
            TooManyUnusableError, UnreachableError: images cannot be used or reached; the run is saved, if it
                is on one rank.
        """
        try:
            return self.batches.next(peek)
        except (TooManyUnusableError, UnreachableError):
            if step and self.ranks.world == 1:
                self.state.save(step)
                self.checkpoints.wait()
            raise

    def check_finite(self, steps_done: int) -> None:
        """Warn of steps that were skipped.

        Raises:
            TrainingError: too many steps in a row were not finite; state and batch are kept for inspection.
        """
        if self.ranks.world > 1 and self.signals.received is not None:
            self.guard.ask_to_stop()  # all ranks, after one of the next steps
        last = steps_done == self.steps
        skipped_before = self.verdict.skipped_total
        self.verdict = self.guard.read(last)
        if self.verdict.skipped_total > skipped_before:
            count = self.verdict.skipped_total
            logger.warning("a step was skipped, its loss or gradient was not finite (%d so far)", count)
        if self.verdict.skipped_in_row > Guard.LIMIT:
            batch = self.batches.recent[-1 if last else 0]  # of the step that the guard has judged
            text = keep_evidence(
                self.config,
                self.run,
                steps_done,
                self.schedule.peak,
                self.state,
                batch,
                self.loader,
                self.ranks,
            )
            raise FirstRankError(text) if self.ranks.rank else TrainingError(text)

    def should_stop(self) -> bool:
        """Whether a signal ends the run after this step: with several ranks, once all of them know."""
        return self.signals.received is not None if self.ranks.world == 1 else self.verdict.stop

    def should_save(self, steps_done: int) -> bool:
        """Whether a checkpoint is due."""
        return steps_done == self.steps or steps_done % self.config.save_every == 0

    def should_evaluate(self, steps_done: int) -> bool:
        """Whether k-NN is due; at the end it is measured on all images."""
        period = self.config.evaluate_every * self.loader.steps_per_epoch
        return steps_done % period == 0 and steps_done < self.steps

    def end(self, steps_done: int) -> None:
        """Wait for the last checkpoint.

        Raises:
            Interrupted: a signal came, on any rank, and the run is saved.
            OSError: a signal came, and the run could not be saved.
        """
        self.checkpoints.wait()
        received = [number for number in self.ranks.gather(self.signals.received) if number is not None]
        if received:
            self.ranks.leave()
            if self.ranks.rank == 0 and self.checkpoints.newest != steps_done:
                raise OSError(f"{self.run}: a signal came, and step {steps_done} could not be saved")
            raise Interrupted(received[0])


def check_ranks(config: PretrainConfig, ranks: Ranks) -> None:
    """Raise ValueError where the configuration does not fit the number of ranks."""
    for key in ("bits", "batch_size"):
        if getattr(config, key) < 2:
            raise ValueError(f"{key}: expected at least 2, because the rate of one is constant, got 1")
    check_shares(config, ranks)
    if config.fsdp and ranks.world == 1:
        raise ValueError("fsdp: expected several ranks to split parameters over, got one; use torchrun")


def check_shares(config: PretrainConfig, ranks: Ranks) -> None:
    """Raise ValueError where ranks and accumulation cannot share a batch."""
    if config.batch_size % (ranks.world * config.accumulate):
        raise ValueError(
            f"batch_size: expected a multiple of {ranks.world * config.accumulate} "
            f"({ranks.world} ranks × accumulate {config.accumulate}), got {config.batch_size}"
        )


def create_loader(config: PretrainConfig, source: Source, ranks: Ranks) -> Loader:
    """The loader of this rank's batches."""
    return Loader(
        source,
        config.crops,
        batch_size=config.batch_size // ranks.world,
        seed=config.seed,
        device=ranks.device,
        threads=config.threads,
        max_unusable=config.max_unusable,
        dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        channels_last=config.channels_last,
        rank=ranks.rank,
        world=ranks.world,
    )


def create_sender(
    config: PretrainConfig, source: Source, follower: Network, ranks: Ranks
) -> Network | FrozenTeacher | StoredMessages:
    """What sends the messages: the student's moving average, or one of the two that do not move.

    Raises:
        ValueError: the weights of a frozen teacher, or the stored messages, do not fit; it names the key.
    """
    if config.messages is not None:
        manifest = ranks.first(lambda: check_messages(config, source))
        share = config.batch_size // ranks.world
        return StoredMessages(config, source, manifest, ranks.device, ranks.rank, share)
    if config.teacher:
        return ranks.leaders_first(lambda: FrozenTeacher(config, ranks.device))
    return follower


def part_of(sender: Network | FrozenTeacher | StoredMessages) -> Replicated:
    """What a checkpoint holds of it: of those that do not move by which they are known, and the codes."""
    if isinstance(sender, StoredMessages):
        return Replicated(sender.state_dict, sender.load_state_dict)
    if isinstance(sender, FrozenTeacher):
        return Replicated(sender.code_state, sender.load_code_state)
    return Replicated(sender.state_dict, partial(load_sharded, sender))


def create_step(
    config: PretrainConfig,
    student: Network,
    teacher: Network | FrozenTeacher | None,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    mark: Callable[[str], None] = lambda part: None,
    rank: int = 0,
) -> Step:
    """The step that the configuration asks for."""
    networks = (student, teacher, objective, optimizer)
    masks = None
    if isinstance(student, DenseNetwork):
        masks = Masks(config.seed, student.patches.rows, student.patches.columns, rank)
        masks = masks.to(next(student.parameters()).device)
    options: dict[str, Any] = {
        "clip": config.clip,
        "precision": config.precision,
        "masks": masks,
        "mark": mark,
    }
    if config.accumulate == 1:
        return Step(*networks, **options)
    return AccumulatedStep(*networks, microbatches=config.accumulate, **options)


def prepare(step: Step, config: PretrainConfig, views: Views) -> Step | CapturedStep:
    """Compile and capture what the configuration asks for, before the first step, and say so."""
    on_gpu = step.forward.device.type == "cuda"
    if step.forward.ranks > 1 and has_batch_norm(step.student) and not on_gpu:
        logger.warning("batch norm's statistics are each rank's own, so results depend on the ranks")
    if config.compile == "on" or (config.compile == "auto" and on_gpu):
        logger.info("torch.compile: compiling; --compile off does without")
        compiled, text = compile_networks(step, *views[:2])
        logger.log(logging.INFO if compiled else logging.WARNING, "%s", text)
    if not config.cuda_graph:
        return step
    captured = CapturedStep(step, *views)
    logger.info("cuda_graph: steps up to the gradient are replayed from a CUDA graph")
    return captured


def announce(job: Job, steps_done: int) -> None:
    """Log what is about to be done."""
    config, ranks, loader = job.config, job.ranks, job.loader
    where = ranks.device.type if ranks.world == 1 else f"{ranks.world} ranks ({ranks.device.type})"
    logger.info(
        f"{f'resuming at step {steps_done}' if steps_done else 'training'}: {config.backbone}, "
        f"{config.bits} bits, {len(job.source.images)} images, {job.steps} steps of {config.batch_size} "
        f"({loader.steps_per_epoch} an epoch), on {where} in {config.precision}, in {config.output}"
    )
    logger.info(job.schedule.describe())
    if job.schedule.resolution.low_steps:
        logger.info(job.schedule.resolution.describe())
    job.source.announce()
    if config.channels != 3:
        logger.info(
            "note: channels: %d, which are no colors: saturation, hue, gray, solarize and posterize are off",
            config.channels,
        )
    elif config.pixel_range is not None:
        logger.info("note: pixel_range: posterize, which is for colors of 8 bits, is off")
    if loader.changed:
        logger.warning(
            "the data changed since the run was saved (%s): it continues with the images that are "
            "there now, and its result will be another one",
            loader.changed,
        )
