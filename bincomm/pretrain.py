"""Pretraining by discrete communication, from top to bottom."""

import json
import os
import platform
import signal
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import yaml

from bincomm import __version__
from bincomm.config import PretrainConfig
from bincomm.data.export import write_unusable
from bincomm.data.loader import Loader, TooManyUnusableError
from bincomm.data.sources import Source, evaluation_sources, open_source
from bincomm.engine.logs import Log, Watch, Window, bit_statistics, plot_curves, printable
from bincomm.engine.optimiser import clear_state, clip_gradients, create_optimiser, set_rates
from bincomm.engine.run import load_checkpoint, open_run, save_checkpoint, write_json, write_text, write_whole
from bincomm.engine.schedules import cosine, warmup_cosine
from bincomm.evaluation.features import extract
from bincomm.evaluation.knn import knn_accuracy
from bincomm.networks import Head, Network, create_backbone, create_teacher, feature_width, update_teacher
from bincomm.objectives import DiscreteCommunication
from bincomm.ops.coding_rate import rate_ceiling


class TrainingError(RuntimeError):
    """Training cannot go on; the run's last checkpoint is kept."""


class Interrupted(Exception):
    """A signal ended the run after a step; its number is the argument."""


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Pretrain a backbone, or go on with the run in `config.output`, to the end; returns what result.json
    holds.

    Raises:
        ValueError: the configuration, the data or the run's directory does not allow it; the message names
            the key.
        TrainingError: the loss or its gradient is no longer finite.
        TooManyUnusableError: more images than `config.max_unusable` allows cannot be used.
        Interrupted: SIGINT or SIGTERM came; the run is saved.
    """
    device = choose_device(config.device)
    if isinstance(config.data, str) and os.path.realpath(config.output) == os.path.realpath(config.data):
        raise ValueError(f"output: expected another folder than that of the images, got {config.output}")
    source = open_source(config.data)
    evaluation = evaluation_sources(config.data, source)
    with open_run(config.output) as run:
        check_same_run(run, config)
        if (run / "result.json").exists():
            print(f"{run} holds a finished run")
            return json.loads((run / "result.json").read_text())
        write_text(run / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
        teacher = train(config, source, run, device)
        export_backbone(teacher, config, run)
        plot_curves(run)
        result = evaluate(teacher, evaluation, config, run, device)
        write_json(run / "result.json", result)
        return result


def train(config: PretrainConfig, source: Source, run: Path, device: torch.device) -> Network:
    """Train, or go on from the run's checkpoint, and return the teacher."""
    loader = Loader(
        source,
        config.crops,
        batch_size=config.batch_size,
        seed=config.seed,
        device=device,
        threads=config.threads,
        max_unusable=config.max_unusable,
        dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        channels_last=config.channels_last,
    )
    epoch_steps = loader.steps_per_epoch
    steps = min(config.epochs * epoch_steps, config.max_steps or config.epochs * epoch_steps)
    warmup = min(config.warmup_epochs * epoch_steps, steps // 4)

    student, teacher = create_networks(config, device)
    objective = DiscreteCommunication(config.beta, config.eps_squared)
    optimiser = create_optimiser(student)
    window, watch = Window(config.log_every, config.bits, device), Watch(config.beta)

    parts = {
        "student": student,
        "teacher": teacher,
        "optimiser": optimiser,
        "loader": loader,
        "window": window,
        "watch": watch,
    }
    step = resume(run, parts)
    log = Log(run, step, steps)
    log.say(
        f"{'resuming at step ' + str(step) if step else 'training'}: {config.backbone}, {config.bits} bits, "
        f"{len(source.images)} images, {steps} steps of {config.batch_size} ({epoch_steps} an epoch), "
        f"on {device.type}, in {run}"
    )
    for note in source.notes:
        log.say(f"note: {note}")
    if loader.changed:
        log.say(
            f"warning: the data changed since the run was saved ({loader.changed}): it goes on with what is "
            "there now, and will not end as it would have"
        )
    named = len(loader.unusable)
    signals = SignalFlag()
    try:
        while step < steps:
            # The head is drawn anew at the start of epochs R, 2R, ...: the same for student and teacher.
            epoch = step // epoch_steps
            if config.reset_every and step % epoch_steps == 0 and epoch and epoch % config.reset_every == 0:
                reset_head(student, teacher, optimiser, seed=(config.seed, epoch))

            peak_lr = config.lr * config.batch_size / 256
            lr = warmup_cosine(step, steps, warmup, peak_lr, min(config.min_lr, peak_lr))
            weight_decay = cosine(step, steps, config.weight_decay, config.weight_decay_end)
            momentum = cosine(step, steps, config.momentum, 1.0)

            asked = time.perf_counter()
            try:
                global_views, local_views = loader.next()
            except TooManyUnusableError:
                if step and window.first_not_finite() is None:
                    save(run, step, parts)
                write_unusable(run / "unusable.txt", loader.found_unusable())
                raise
            named = tell_unusable(loader, named, run, log)
            waited = time.perf_counter() - asked

            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                with torch.no_grad():
                    message = teacher(global_views)
                logits = student(global_views) if local_views is None else student(global_views, local_views)
            losses = objective(logits, message)
            losses["loss"].backward()
            gradient_norm = clip_gradients(student, config.clip)
            set_rates(optimiser, lr, weight_decay)
            optimiser.step()
            optimiser.zero_grad()
            update_teacher(teacher, student, momentum)
            window.add(losses, gradient_norm, logits, message)
            step += 1

            log.step(config.batch_size, waited)
            last = step == steps
            ended_by = signals.received  # read once: a signal that comes from here on is for the next step
            saving = last or step % config.save_every == 0 or ended_by is not None
            logging = last or step % config.log_every == 0
            if (saving or logging) and (ago := window.first_not_finite()) is not None:
                raise TrainingError(not_finite(step - ago, run, config))
            if logging:
                metrics = window.report()
                log.write(step, {**metrics, "lr": lr, "momentum": momentum, "epoch": epoch})
                # A head is given its warm-up and, where it is drawn anew, an epoch before it is judged.
                new = config.reset_every > 1 and epoch % config.reset_every == 0 and epoch > 0
                for warning in watch.look(metrics) if step > warmup and not new else ():
                    log.say(warning)
            if saving:
                save(run, step, parts)
            if ended_by is not None:
                raise Interrupted(ended_by)
    finally:
        signals.restore()
        log.close()
    return teacher


def create_networks(config: PretrainConfig, device: torch.device) -> tuple[Network, Network]:
    """Student and teacher as they are before the first step: equal, and determined by the seed."""
    torch.manual_seed(config.seed)
    arguments = dict(config.backbone_args)
    if config.drop_path:
        arguments["drop_path_rate"] = config.drop_path
    backbone, _ = create_backbone(config.backbone, config.global_size, **arguments)
    sizes = [config.global_size] + [config.local_size] * (config.local_crops > 0)
    head = Head(feature_width(backbone, sizes), config.hidden, config.bits, config.head_std)
    student = Network(backbone, head)
    # The teacher's message is to be certain: nothing is dropped in it, neither paths nor features.
    certain = {key: value for key, value in arguments.items() if "drop" not in key}
    still, _ = create_backbone(config.backbone, config.global_size, **certain)
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    student = student.to(device, memory_format=layout)
    return student, create_teacher(student, still).to(device, memory_format=layout)


def reset_head(
    student: Network, teacher: Network, optimiser: torch.optim.Optimizer, seed: tuple[int, int]
) -> None:
    """Draw the head anew, the same for student and teacher, and clear the optimiser's state of it."""
    student.head.reset(torch.Generator().manual_seed(hash_seed(*seed)))
    teacher.head.load_state_dict(student.head.state_dict())
    clear_state(optimiser, student.head)


def hash_seed(seed: int, epoch: int) -> int:
    """One seed from a run's seed and an epoch, different for different pairs of ordinary size."""
    return (seed * 1_000_003 + epoch) % 2**63


def save(run: Path, step: int, parts: dict[str, Any]) -> None:
    """Everything that determines the steps to come."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"step": step, "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    save_checkpoint(run / "last.ckpt", state)


def resume(run: Path, parts: dict[str, Any]) -> int:
    """Take up the run's checkpoint, if it has one; returns the steps done."""
    state = load_checkpoint(run / "last.ckpt")
    if state is None:
        return 0
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"])
    return state["step"]


def tell_unusable(loader: Loader, named: int, run: Path, log: Log) -> int:
    """Name the unusable images beyond the first `named`, and keep a list of all; returns how many."""
    found = loader.unusable
    for count, (name, why) in enumerate(found[named:], named + 1):
        log.say(f"left out: {name}: {why} ({count} of {len(loader.images)} images so far)")
    if len(found) > named:
        write_unusable(run / "unusable.txt", found)
    return len(found)


def export_backbone(teacher: Network, config: PretrainConfig, run: Path) -> None:
    """The teacher's backbone as timm loads it; its metadata holds the arguments of `timm.create_model`."""
    weights = {name: value.contiguous().cpu() for name, value in teacher.backbone.state_dict().items()}
    _, arguments = create_backbone(config.backbone, config.global_size, **config.backbone_args)
    # One key: safetensors writes several in random order, and two equal runs leave equal files.
    data = safetensors.torch.save(weights, metadata={"create_model": json.dumps(arguments)})
    write_whole(run / "backbone.safetensors", lambda file: file.write(data))


def evaluate(
    teacher: Network,
    sources: tuple[Source, Source, bool] | None,
    config: PretrainConfig,
    run: Path,
    device: torch.device,
) -> dict[str, Any]:
    """k-NN of the teacher, of the same network before training, of pixels and codes; use of the bits."""
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    result: dict[str, Any] = {
        "last_metrics": json.loads(metrics[-1]),
        "rate_ceiling": rate_ceiling(
            torch.tensor(config.batch_size, dtype=torch.float64), config.bits, config.eps_squared
        ).item(),
        "versions": {"bincomm": __version__, "torch": torch.__version__, "timm": timm.__version__},
        "machine": {"device": device.type, "python": platform.python_version()},
    }
    if sources is None:
        return {**result, "knn": None}
    gallery, queries, held_out = sources
    untrained, _ = create_networks(config, device)

    def tell(image: int, why: str) -> None:
        print(printable(f"left out of the queries: {queries.images.name(image)}: {why}"))

    # What cannot be used of the pretraining images was told when they were trained on.
    trained = [
        extract(teacher, gallery, config, device),
        extract(teacher, queries, config, device, **({"report": tell} if held_out else {})),
    ]
    if not all(len(found["images"]) for found in trained):
        return {**result, "knn": None}
    before = [extract(untrained, source, config, device) for source in (gallery, queries)]
    labels = [
        torch.from_numpy(source.labels)[found["images"]]
        for source, found in zip((gallery, queries), trained, strict=True)
    ]

    def knn(gallery_features: torch.Tensor, query_features: torch.Tensor) -> float:
        return knn_accuracy(*(x.to(device) for x in (gallery_features, labels[0], query_features, labels[1])))

    signs = trained[1]["signs"]
    return {
        **result,
        "knn": {
            "teacher": knn(trained[0]["features"], trained[1]["features"]),
            "codes": knn(trained[0]["signs"], trained[1]["signs"]),
            "random_initialisation": knn(before[0]["features"], before[1]["features"]),
            "pixels": knn(trained[0]["pixels"], trained[1]["pixels"]),
            "k": 20,
            "gallery_images": len(labels[0]),
            "query_images": len(labels[1]),
            "queries_held_out": held_out,
        },
        "codes": bit_statistics((signs > 0).sum(0), len(signs)),
    }


def choose_device(name: str) -> torch.device:
    """The device of the configuration's key `device`."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but this torch finds no GPU")
    return torch.device(
        "cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu")
    )


def check_same_run(run: Path, config: PretrainConfig) -> None:
    """Refuse to go on with a run of another configuration; one that saved nothing is not in the way."""
    if not any((run / name).exists() for name in ("last.ckpt", "result.json")):
        return
    try:
        theirs = dict(yaml.safe_load((run / "config.yaml").read_text()))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"output: {run} holds a run, but its config.yaml cannot be read: {error}") from error
    different = config.differences(theirs)
    if different:
        keys = "; ".join(f"{key} was {was}, now {now}" for key, (was, now) in different.items())
        raise ValueError(
            f"output: {run} holds a run of another configuration ({keys}); choose another --output"
        )


def not_finite(step: int, run: Path, config: PretrainConfig) -> str:
    """What to tell when the loss or its gradient is no longer finite."""
    kept = (
        f"the last good checkpoint is {run / 'last.ckpt'}"
        if (run / "last.ckpt").exists()
        else "nothing was saved yet"
    )
    return (
        f"the loss or its gradient is not finite at step {step}; {kept}. "
        f"Lower lr (now {config.lr:g}) or clip (now {config.clip:g}), or use precision fp32 (now "
        f"{config.precision}), and begin again with another --output."
    )


class SignalFlag:
    """Remembers SIGINT and SIGTERM until the step is done; a second SIGINT interrupts at once."""

    def __init__(self):
        self.received: int | None = None
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
