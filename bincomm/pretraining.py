"""Pretraining by discrete communication, from top to bottom."""

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from bincomm.building import create_networks, create_objective, hash_seed, reset_head
from bincomm.config import PretrainConfig, read_config
from bincomm.data.export import write_unusable
from bincomm.data.loader import Loader, TooManyUnusableError, merge_states
from bincomm.data.sources import Source, evaluation_sources, open_source
from bincomm.distributed.ranks import FirstRankError, Ranks, join_ranks
from bincomm.distributed.sharding import gather_tensors, load_sharded, load_sharded_optimizer, shard
from bincomm.engine.checkpoints import Checkpoints, load_checkpoint, save_checkpoint
from bincomm.engine.collapse import CollapseMonitor
from bincomm.engine.curves import plot_curves
from bincomm.engine.guard import Guard
from bincomm.engine.metrics import MetricsWindow
from bincomm.engine.optimizer import create_optimizer
from bincomm.engine.records import Records
from bincomm.engine.run import open_run
from bincomm.engine.schedules import cosine, warmup_cosine
from bincomm.engine.step import Step, has_batch_norm
from bincomm.evaluation.run import evaluate_run
from bincomm.files import write_file, write_json, write_text
from bincomm.networks import Network, create_backbone
from bincomm.ops.coding_rate import rate_ceiling

OWN = ("loader", "window")  # parts of a run that every rank has its own state of


class TrainingError(RuntimeError):
    """Training cannot go on; the run's last checkpoint is kept."""


class Interrupted(Exception):
    """A signal ended the run, and its last step is saved; the signal's number is the argument."""


def pretrain(config: PretrainConfig) -> dict[str, Any] | None:
    """Pretrain a backbone, or go on with the run in `config.output`, to the end; returns what result.json
    holds. Where there are several ranks all call it, and those after the first return None.

    Raises:
        ValueError: the configuration, the data or the run's directory does not allow it; the message names
            the key.
        TrainingError: the loss or its gradient was not finite in several steps in a row.
        TooManyUnusableError: more images than `config.max_unusable` allows cannot be used.
        Interrupted: SIGINT or SIGTERM came; the run is saved.
        OSError: what the run is to leave could not be written.
    """
    if isinstance(config.data, str) and os.path.realpath(config.output) == os.path.realpath(config.data):
        raise ValueError(f"output: expected another folder than that of the images, got {config.output}")
    with join_ranks(config.device) as ranks:
        source = ranks.leaders_first(lambda: open_source(config.data))
        evaluation = ranks.leaders_first(lambda: evaluation_sources(config.data, source))
        with open_run(config.output, ranks) as run:
            if ranks.first(lambda: begin(run, config)) == "finished":
                if ranks.rank:
                    return None
                print(f"{run} holds a finished run")
                return read_result(run)
            with Signals(run) as signals:
                teacher = train(config, source, run, ranks, signals)
                ranks.leave()  # what remains is rank 0's work, and the others need not wait for it
                if ranks.rank:
                    return None
                export_backbone(teacher, config, run)
                plot_curves(run)
                result = evaluate_run(teacher, evaluation, config, run, ranks.device)
                write_json(run / "result.json", result)
                return result


def train(config: PretrainConfig, source: Source, run: Path, ranks: Ranks, signals: "Signals") -> Network:
    """Train, or go on from the run's newest checkpoint, and return the teacher."""
    ranks.first(lambda: check_ranks(config, ranks))
    loader = create_loader(config, source, ranks)
    epoch_steps = loader.steps_per_epoch
    steps = min(config.epochs * epoch_steps, config.max_steps or config.epochs * epoch_steps)
    warmup = min(config.warmup_epochs * epoch_steps, steps // 4)
    peak_lr = config.lr * config.batch_size / 256

    # What is to be split does not fit on a GPU before it is.
    student, teacher = create_networks(config, torch.device("cpu") if config.fsdp else ranks.device)
    if ranks.world > 1 and ranks.device.type == "cuda":  # there is no such batch norm for CPUs
        student, teacher = convert_sync_batchnorm(student), convert_sync_batchnorm(teacher)
    objective = create_objective(config).to(ranks.device)
    if config.fsdp:
        shard(student, ranks)
        shard(teacher, ranks)
    optimizer = create_optimizer(student)
    one_step = create_step(config, student, teacher, objective, optimizer)
    bits = config.bits if objective.outputs_are_bits else None
    window = MetricsWindow(config.log_every, objective.scalars, bits, ranks.device)
    watch = create_watch(config)
    parts = {
        "student": student,
        "teacher": teacher,
        "objective": objective,
        "optimizer": optimizer,
        "guard": one_step.guard,
        "loader": loader,
        "window": window,
        "watch": watch,
    }
    checkpoints = Checkpoints(run / "checkpoints", config.keep, print)
    step = resume(checkpoints, config, parts, ranks)
    log = Records(run, step, steps, ranks)
    checkpoints.say = log.say
    if ranks.rank == 0:
        announce(config, loader, source, step, steps, ranks, log)
    if ranks.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes never change
    named = len(loader.unusable)
    guard = one_step.guard
    batches: deque[tuple] = deque(maxlen=guard.lag + 1)  # the oldest is the one that the guard judges
    begun, skipped = step, int(guard.counts[0])
    signals.wait_for_step = True
    try:
        while step < steps:
            # The head is drawn anew at the start of epochs R, 2R, ...: the same for student and teacher.
            epoch = step // epoch_steps
            if config.reset_every and step % epoch_steps == 0 and epoch and epoch % config.reset_every == 0:
                reset_head(student, teacher, optimizer, seed=(config.seed, epoch))

            asked = time.perf_counter()
            try:
                views = loader.next()
            except TooManyUnusableError:
                with contextlib.suppress(OSError):  # the error that is to be told is the other one
                    write_unusable(run / "unusable.txt", loader.found_unusable())
                if step and ranks.world == 1:
                    save(checkpoints, step, config, parts, ranks)
                    checkpoints.finish()
                raise
            named = tell_unusable(loader, named, run, log, ranks)
            waited = time.perf_counter() - asked
            if step == begun:
                prepare(one_step, config, views, log)
                log.since, waited = time.perf_counter(), 0.0

            lr = warmup_cosine(step, steps, warmup, peak_lr, min(config.min_lr, peak_lr))
            weight_decay = cosine(step, steps, config.weight_decay, config.weight_decay_end)
            momentum = cosine(step, steps, config.momentum, 1.0)
            done = one_step(*views, lr=lr, weight_decay=weight_decay, momentum=momentum)
            window.add(done)
            step += 1
            log.step(config.batch_size, waited)

            batches.append((views, loader.indices))
            if ranks.world > 1 and signals.received is not None:
                guard.ask_to_stop()
            last = step == steps
            count, in_row, stop = guard.read(last)
            if count > skipped:
                log.say(f"warning: a step was skipped, its loss or gradient was not finite ({count} so far)")
                skipped = count
            if in_row > guard.LIMIT:
                evidence = keep_evidence(run, step, config, parts, ranks, batches[-1 if last else 0])
                raise FirstRankError(evidence) if ranks.rank else TrainingError(evidence)
            # Alone, a rank reads the signal itself, once: one that comes from here on is for the next step.
            stop = signals.received is not None if ranks.world == 1 else stop
            if last or step % config.log_every == 0:
                metrics = window.report()
                log.write(step, {**metrics, "lr": lr, "momentum": momentum, "epoch": epoch})
                # A head is given its warm-up and, where it is drawn anew, an epoch before it is judged.
                new = config.reset_every > 1 and epoch % config.reset_every == 0 and epoch > 0
                for warning in watch.look(metrics) if step > warmup and not new and not ranks.rank else ():
                    log.say(warning)
            if last:
                log.flush()  # or it raises, and the same command does again what is not written
            if last or stop or step % config.save_every == 0:
                save(checkpoints, step, config, parts, ranks)
            checkpoints.poll()
            if stop:
                break
        checkpoints.finish()
        received = ranks.gather(signals.received)  # and rank 0 has written the checkpoint
        if any(received):
            ranks.leave()
            if ranks.rank == 0 and checkpoints.newest != step:
                raise OSError(f"{run}: a signal came, and step {step} could not be saved")
            raise Interrupted(next(filter(None, received)))
    finally:
        checkpoints.finish()
        signals.wait_for_step = False
        log.close()
    if config.fsdp:
        weights = gather_tensors(teacher.state_dict(), keep=ranks.rank == 0)
        if ranks.rank == 0:
            del student, optimizer, one_step, parts  # one GPU is to hold all of the teacher
            teacher = create_networks(replace(config, fsdp=False), ranks.device)[1]
            teacher.load_state_dict(weights)
    return teacher


def check_ranks(config: PretrainConfig, ranks: Ranks) -> None:
    """Raise ValueError where the configuration does not fit the number of ranks."""
    if config.batch_size % (ranks.world * config.accumulate):
        raise ValueError(
            f"batch_size: expected a multiple of {ranks.world * config.accumulate} "
            f"({ranks.world} ranks × accumulate {config.accumulate}), got {config.batch_size}"
        )
    if config.fsdp and ranks.world == 1:
        raise ValueError("fsdp: expected several ranks to split parameters over, got one; use torchrun")


def create_loader(config: PretrainConfig, source: Source, ranks: Ranks) -> Loader:
    """The batches of this rank."""
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


def create_step(
    config: PretrainConfig,
    student: Network,
    teacher: Network,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Step:
    """The step that the configuration asks for."""
    return Step(
        student,
        teacher,
        objective,
        optimizer,
        clip=config.clip,
        precision=config.precision,
        accumulate=config.accumulate,
    )


def announce(
    config: PretrainConfig, loader: Loader, source: Source, step: int, steps: int, ranks: Ranks, log: Records
) -> None:
    """Say what is about to be done."""
    where = ranks.device.type if ranks.world == 1 else f"{ranks.world} ranks ({ranks.device.type})"
    log.say(
        f"{'resuming at step ' + str(step) if step else 'training'}: {config.backbone}, {config.bits} bits, "
        f"{len(source.images)} images, {steps} steps of {config.batch_size} ({loader.steps_per_epoch} an "
        f"epoch), on {where}, in {config.output}"
    )
    for note in source.notes:
        log.say(f"note: {note}")
    if loader.changed:
        log.say(
            f"warning: the data changed since the run was saved ({loader.changed}): it goes on with what is "
            "there now, and will not end as it would have"
        )


def prepare(
    one_step: Step, config: PretrainConfig, views: tuple[Tensor, Tensor | None], log: Records
) -> None:
    """Compile and capture what the configuration asks for, before the first step, and say so."""
    on_gpu = one_step.device.type == "cuda"
    if one_step.ranks > 1 and has_batch_norm(one_step.student) and not on_gpu:
        log.say("warning: batch norm's statistics are each rank's own, so results depend on the ranks")
    if config.compile == "on" or (config.compile == "auto" and on_gpu):
        log.say("torch.compile: compiling; --compile off does without")
        log.say(one_step.compile(*views))
    if config.cuda_graph:
        one_step.capture(*views)
        log.say("cuda_graph: steps up to the gradient are replayed from a CUDA graph")


def create_watch(config: PretrainConfig) -> CollapseMonitor:
    """Limits between which the configuration's coding rate lies, and what its agreement means."""
    images = torch.tensor(config.batch_size, dtype=torch.float64)
    return CollapseMonitor(
        config.beta if config.method == "bits" else None,
        floor=math.log1p(config.bits / config.eps_squared) / 2,
        ceiling=rate_ceiling(images, config.bits, config.eps_squared).item(),
        hard_bits=config.method == "bits" and config.agreement != "cosine",
    )


def save(
    checkpoints: Checkpoints, step: int, config: PretrainConfig, parts: dict[str, Any], ranks: Ranks
) -> None:
    """Everything that determines the steps to come, written by rank 0; all ranks call it."""
    checkpoints.finish()  # so that no two copies are in memory
    state = collect(step, config, parts, ranks)
    if ranks.rank == 0:
        checkpoints.save(step, state)


def collect(step: int, config: PretrainConfig, parts: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The state of a run, copied to the CPU; complete on rank 0."""
    state: dict[str, Any] = {"step": step, "config": config.as_dict()}
    own = {"rng": torch.get_rng_state()}
    own |= {name: parts[name].state_dict() for name in OWN}
    if ranks.device.type == "cuda":
        own["cuda_rng"] = torch.cuda.get_rng_state(ranks.device)
    every = ranks.gather(own)
    if ranks.rank == 0 or config.fsdp:  # where every rank has a share of the tensors
        alike = {name: part.state_dict() for name, part in parts.items() if name not in OWN}
        state |= gather_tensors(alike, keep=ranks.rank == 0)
    state["loader"] = merge_states([rank.pop("loader") for rank in every])
    return {**state, "ranks": every}


def resume(checkpoints: Checkpoints, config: PretrainConfig, parts: dict[str, Any], ranks: Ranks) -> int:
    """Take up the run's newest checkpoint, if it has one; returns the steps done."""
    state = read_newest(checkpoints, ranks)
    if state is None:
        if ranks.rank:  # the networks are the same on all ranks, the paths dropped in them are not
            torch.manual_seed(hash_seed(config.seed, -ranks.rank))
        return 0
    ranks.first(lambda: refuse_differences(config, state["config"], str(checkpoints.folder)))
    every = state["ranks"]
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            load_sharded(part, state[name])
        elif name == "optimizer":
            load_sharded_optimizer(part, state[name])
        elif name == "window":
            part.load_state_dicts([rank[name] for rank in every], ranks.rank, ranks.world)
        else:
            part.load_state_dict(state[name])
    if len(every) == ranks.world:
        own = every[ranks.rank]
        torch.set_rng_state(own["rng"])
        if "cuda_rng" in own and ranks.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"], ranks.device)
    else:  # as many ranks as never were
        torch.manual_seed(hash_seed(config.seed + state["step"], -ranks.rank))
    return state["step"]


def read_newest(checkpoints: Checkpoints, ranks: Ranks) -> dict[str, Any] | None:
    """The newest checkpoint that rank 0 finds whole, on all ranks; None where there is none.

    Raises:
        ValueError: none is whole, or a rank does not see the one that rank 0 sees.
    """
    found: list[dict[str, Any] | None] = [None]

    def choose() -> int | None:
        found[0] = checkpoints.load()
        return checkpoints.newest if found[0] is not None else None

    step, trouble = ranks.first(choose), ""
    if ranks.rank and step is not None:
        try:
            found[0] = load_checkpoint(checkpoints.path(step))
        except (OSError, ValueError) as error:
            trouble = f"rank {ranks.rank} does not see the checkpoint that rank 0 goes on from: {error}"
    troubles = [each for each in ranks.gather(trouble) if each]

    def tell() -> None:
        if troubles:
            raise ValueError(f"output: expected one folder that all ranks share; {troubles[0]}")

    ranks.first(tell)
    return found[0]


def keep_evidence(
    run: Path, step: int, config: PretrainConfig, parts: dict[str, Any], ranks: Ranks, batch: tuple
) -> str:
    """Save the state and this rank's batch for inspection, and put what happened into words."""
    state = collect(step, config, parts, ranks)
    (global_views, local_views), images = batch
    found = {
        "global_views": global_views.cpu(),
        "local_views": None if local_views is None else local_views.cpu(),
        "images": [parts["loader"].images.name(image) for image in images],
    }
    kept = f"the state and the batch are in {run}/not_finite*.ckpt"
    try:
        if ranks.rank == 0:
            save_checkpoint(run / "not_finite.ckpt", state)
        save_checkpoint(run / f"not_finite_batch_{ranks.rank}.ckpt", found)
    except OSError as error:
        kept = f"the state and the batch could not be saved ({error})"
    ranks.gather(None)  # the first to end ends the others
    return (
        f"the loss or its gradient was not finite in more than {Guard.LIMIT} steps in a row, up to step "
        f"{step}; {kept}, and {run / 'checkpoints'} holds the last good checkpoints. Lower lr (now "
        f"{config.lr:g}) or clip (now {config.clip:g}), or use precision fp32 (now {config.precision}), and "
        "begin again with another --output."
    )


def tell_unusable(loader: Loader, named: int, run: Path, log: Records, ranks: Ranks) -> int:
    """Name the unusable images beyond the first `named`, and keep a list of all that rank 0 knows, which are
    those of all ranks as of the last checkpoint that was gone on from; returns how many."""
    found = loader.unusable
    for count, (name, why) in enumerate(found[named:], named + 1):
        log.say(f"left out: {name}: {why} ({count} of {len(loader.images)} images so far)", everywhere=True)
    if len(found) > named and ranks.rank == 0:
        try:
            write_unusable(run / "unusable.txt", found)
        except OSError as error:
            log.say(f"warning: {error}")
    return len(found)


def export_backbone(teacher: Network, config: PretrainConfig, run: Path) -> None:
    """The teacher's backbone as timm loads it; its metadata holds the arguments of `timm.create_model`, by
    which timm also knows how it was evaluated: size, crop, mean and std."""
    weights = {name: value.contiguous().cpu() for name, value in teacher.backbone.state_dict().items()}
    _, arguments = create_backbone(config.backbone, config.global_size, **config.backbone_args)
    arguments["pretrained_cfg_overlay"] = {
        "input_size": [3, config.global_size, config.global_size],
        "crop_pct": config.eval_crop,
        "mean": list(config.mean),
        "std": list(config.std),
    }
    # One key: safetensors writes several in random order, and two equal runs leave equal files.
    data = safetensors.torch.save(weights, metadata={"create_model": json.dumps(arguments)})
    write_file(run / "backbone.safetensors", lambda file: file.write(data))


def begin(run: Path, config: PretrainConfig) -> str:
    """Whether the run in a directory is "new", "unfinished" or "finished"; refuses one of another
    configuration, and what `config.resume` does not want."""
    finished = (run / "result.json").exists()
    if not finished and not Checkpoints(run / "checkpoints", config.keep, print).steps():
        if config.resume == "must":
            raise ValueError(f"resume: expected a run in {run} to go on with, got none")
        write_text(run / "config.yaml", dump(config))
        return "new"
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun; the run is our own
    if config.resume == "never" and not restarted:
        raise ValueError(f"resume: expected no run in {run}, got one; choose another --output")
    refuse_differences(config, read_config(run, "output"), str(run))
    if not finished:
        write_text(run / "config.yaml", dump(config))
    return "finished" if finished else "unfinished"


def dump(config: PretrainConfig) -> str:
    """A configuration as a recipe."""
    return yaml.safe_dump(config.as_dict(), sort_keys=False)


def refuse_differences(config: PretrainConfig, theirs: dict[str, Any], where: str) -> None:
    """Raise ValueError naming the keys in which a run's configuration is another."""
    different = config.differences(theirs)
    if different:
        keys = "; ".join(f"{key} was {was}, now {now}" for key, (was, now) in different.items())
        raise ValueError(
            f"output: {where} holds a run of another configuration ({keys}); choose another --output"
        )


def read_result(run: Path) -> dict[str, Any]:
    """What a finished run's result.json holds.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return json.loads((run / "result.json").read_text())
    except ValueError as error:
        raise ValueError(
            f"output: {run / 'result.json'} is damaged ({error}); remove it to evaluate anew"
        ) from error


class Signals:
    """While held, SIGINT and SIGTERM end the run where it can be gone on with.

    With `wait_for_step` they are only remembered, and a second SIGINT interrupts at once. Otherwise they
    raise: `Interrupted` where the run has a checkpoint, for nothing is lost then, else KeyboardInterrupt.
    """

    def __init__(self, run: Path):
        self.checkpoints = Checkpoints(run / "checkpoints", 1, print)
        self.received: int | None = None
        self.wait_for_step = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # no other may
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            if handler is not None:  # else it was not set from Python
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        again = self.received is not None
        self.received = number
        if self.wait_for_step and not (again and number == signal.SIGINT):
            return
        raise (
            Interrupted(number) if not self.wait_for_step and self.checkpoints.steps() else KeyboardInterrupt
        )
