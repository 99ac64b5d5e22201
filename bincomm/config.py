"""The keys of a pretraining run, one flat set for recipes, command line and Python; `configure` is in
`bincomm.configuration`."""

import glob
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from bincomm.data.addresses import check_address, is_address
from bincomm.data.crops import Crops, check_limits, without_colors
from bincomm.files import expand_home, read_yaml

# Keys that change how a run is carried out but not what it computes: a run may be resumed with other values.
# So is augment, for the keys that it sets are compared themselves. Those in the last row change results by
# rounding, and change which paths drop_path drops.
INCIDENTAL = (
    "output", "threads", "save_every", "log_every", "evaluate_every", "max_unusable", "resume", "keep",
    "fewest_steps", "augment", "tracker",
    "device", "compile", "cuda_graph", "accumulate", "checkpoint_activations", "fsdp", "channels_last",
)  # fmt: skip

# The smallest and largest value of every number: those beyond are mistakes, or more than a run can compute or
# hold. Those of the crops are in `bincomm.data.crops`.
LIMITS: dict[str, tuple[float, float]] = {
    "tau": (1e-3, 1e3), "prototypes": (1, 2**24), "freeze_last_layer": (0, 10**9),
    "freeze_backbone": (0, 10**9), "seed": (0, 2**63 - 1), "epochs": (1, 10**9), "fewest_steps": (0, 10**9),
    "max_steps": (1, 10**12), "minutes": (1e-3, 10**7), "batch_size": (1, 2**24), "bits": (1, 2**16),
    "hidden": (1, 2**16), "head_std": (1e-6, 100), "reset_every": (0, 10**9), "beta": (0, 10**6),
    "eps_squared": (1e-6, 10**6), "dense": (0, 10**3), "lr": (0, 10), "min_lr": (0, 10),
    "warmup_epochs": (0, 10**9),
    "weight_decay": (0, 10), "weight_decay_end": (0, 10), "clip": (0, 10**9), "drop_path": (0, 1),
    "momentum": (0, 1), "accumulate": (1, 2**24), "eval_crop": (0.01, 1), "threads": (1, 1024),
    "max_unusable": (0, 1), "log_every": (1, 10**6), "save_every": (1, 10**9), "keep": (1, 10**9),
    "evaluate_every": (0, 10**9), "low_resolution": (0, 0.99), "low_resolution_sizes": (1, 4096),
}  # fmt: skip
WEIGHTS = (1e-6, 10**6)  # of sources in a mix

# What the methods' own codes set otherwise than the paper does for bits: `bincomm.configuration` takes these
# keys for a method that is not the recipe's, and for one that leaves them open.
KEYS_OF_METHODS: dict[str, dict[str, Any]] = {
    "bits": {"clip": 1.0, "min_lr": 5e-5, "reset_every": "auto", "freeze_last_layer": 0},
    "simdino": {"clip": 3.0, "min_lr": 1e-6, "reset_every": 0, "freeze_last_layer": 0},
    "dino": {"clip": 3.0, "min_lr": 1e-6, "reset_every": 0, "freeze_last_layer": 1},
}

# Keys that a recipe sets for a teacher that follows the student: they do not hold for one that is frozen.
KEYS_OF_MOVING_TEACHERS = ("beta", "reset_every", "momentum")


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that determines a pretraining run.

    The defaults are the paper's: ViT-B/16, ImageNet-1K, 100 epochs. In a run of that length, auto stands for
    the paper's values; only beta is found while training.

    Args:
        data: a folder of images (nested or flat), tar shards (data-{000..127}.tar), Parquet files of images
            (train-*.parquet), addresses of shards (s3://, gs://, https://, hf://datasets/USER/NAME), a .txt
            file of image paths, a standard set by name ("cifar10"), or "digits"; or several such with
            weights, the shares of an epoch's images from each: {"photos": 3, "cifar10": 1}.
        output: the run's directory; made if missing.
        resume: auto resumes the unfinished run in output if there is one; never refuses a directory that
            holds a run; must refuses one that holds none.
        init_from: initial weights of the backbone: a run's directory, a .safetensors file, or the name of a
            timm model with pretrained weights. The head is initialized randomly.
        teacher: weights of a teacher that does not move, or of several, which share the bits: runs'
            directories, .safetensors files that bincomm wrote, or names of timm models with pretrained
            weights. The student is what the run then ends with; beta auto is 0, reset_every auto never.
        messages: a folder of `bincomm messages`, to be learned in place of those of a teacher in memory.
        method: the objective: the paper's bits, or its baselines SimDINO or DINO, which bring clip, min_lr,
            reset_every and freeze_last_layer of their own.
        agreement: the targets of the method bits: hard, the teacher's bits; soft, sigmoid(logit/tau); or
            cosine, the cosine similarity of the student's logits and the bits as ±1.
        tau: temperature of the soft agreement.
        expa_type: of the method simdino: 1 takes the coding rate of the mean of student and teacher, 0 that
            of the student.
        prototypes: number of prototypes of the method dino; the bottleneck of its head has `bits` dimensions.
        freeze_last_layer: number of epochs, the first ones, in which the method dino does not train its
            prototypes.
        freeze_backbone: number of epochs, the first ones and at most a quarter of the run, in which the head
            alone is trained, so that a new head does not disturb a backbone that has learned.
        seed: determines initialization, order of images and augmentations.
        epochs: passes over the data.
        max_steps: end after this many steps, even if epochs are more; the schedules then span these steps.
        minutes: train for about this many minutes: the number of steps is chosen from the speed of the first
            ones, in place of epochs and max_steps.
        fewest_steps: with minutes: where fewer steps than this fit, the batch is halved until as many do, or
            until it has 16 images; a recipe's does not hold for a batch_size that is given.
        batch_size: images per step, over all GPUs.
        backbone: a timm model name.
        backbone_args: further arguments of timm.create_model, for example {"layers": [1, 1, 1, 1]}.
        bits: K, the number of bits of a message.
        hidden: width of the head's two hidden layers.
        head_std: standard deviation of the initial weights of a head with 768 features and a hidden width of
            2048; heads of other widths are scaled so that their initial logits are as large.
        reset_every: reset the head to random weights every this many epochs; 0 = never. auto: every tenth of
            the run, in whole epochs, if that is at least 2000 steps, else never.
        beta: β, weight of the coding rate. auto: found while training, as small as keeps the bits in use.
        eps_squared: ε² of the coding rate.
        dense: of the method bits: weight of a second loss, by which patches that are masked in the student's
            global crops predict the bits of the teacher's patches; 0 = off.
        lr: peak learning rate for a batch of 256; scaled in proportion to batch_size. auto: 5e-4 for batches
            of 256, in proportion to √batch_size, and up to eight times as much below 768 features.
        min_lr: learning rate at the end.
        warmup_epochs: epochs of linear warm-up, at most a quarter of the run. auto: a tenth of the run.
        weight_decay: weight decay at the start; biases and other one-dimensional parameters have none.
        weight_decay_end: weight decay at the end, reached by a cosine schedule.
        clip: largest gradient norm of a parameter tensor; 0 = no clipping.
        drop_path: stochastic depth rate of the student.
        momentum: momentum of the teacher's moving average at the start; 1 at the end, by a cosine schedule.
            auto: 1 - 20/steps, at least 0.9 and at most 0.996.
        precision: number format of the networks' forward pass, bf16 or fp32; auto: bf16 on a GPU and on
            processors that compute in it, else fp32. The losses are always in fp32.
        compile: torch.compile both networks; auto does so on a GPU.
        cuda_graph: replay a step's launches from a CUDA graph; for small networks on one GPU, whose steps are
            shorter than launching them.
        accumulate: number of parts that a step's images are divided into, to need less memory at the cost of
            one more forward pass; the loss stays that of all images.
        checkpoint_activations: recompute the backbone's activations in the backward pass, to save memory.
        fsdp: split parameters and optimizer over the GPUs (FSDP2), for backbones that do not fit on one.
        global_size: side of the two global crops, pixels.
        global_scale: range of the area of a global crop, as a share of the image.
        local_crops: number of local crops, which the student alone sees.
        local_size: side of the local crops, pixels.
        local_scale: range of the area of a local crop.
        low_resolution: share of the run's steps, the first ones, whose crops have smaller sides, which takes
            less time; 0 = none.
        low_resolution_sizes: sides of the global and the local crops in these steps, pixels; null: half of
            global_size and of local_size.
        augment: preset of augmentations for a domain of images. It sets keys of augmentations and crops, in
            place of the recipe's values; keys that are given still win. photos: the recipe's own.
        flip: probability of a horizontal flip.
        flip_vertical: probability of a vertical flip.
        right_angles: probability of a rotation by 90, 180 or 270 degrees.
        rotate: largest angle of a rotation, degrees; only what is in the image is shown.
        shear: largest angle of a horizontal shear (a slant), degrees.
        jitter: strengths of brightness, contrast, saturation and hue jitter, as in torchvision.
        jitter_p: probability of color jitter.
        gray: probability of a gray image.
        blur: probabilities of a blur for global 1, global 2 and the locals.
        solarize: probability of solarizing global 2.
        posterize: probability of keeping only the highest 4 to 7 bits of a color.
        mean: mean by which colors (from 0 to 1) are normalized; the default is ImageNet's. Weights given by
            init_from may need another one.
        std: standard deviation by which colors are normalized, see mean.
        channels: number of channels of an image. Others than 3 are no colors: saturation, hue, gray and
            solarize are off, and mean and std have as many numbers, which `bincomm data stats` measures.
        pixel_range: the values of a pixel that become 0 and 1, the smaller first; values beyond become the
            nearer one. null: the full scale of 8 or of 16 bits; other numbers need a range. Three channels
            with a range keep all their bits, without one 8.
        eval_crop: side of the center crop in evaluation, as a share of the resized image's side.
        device: auto takes a GPU if there is one.
        threads: number of CPU threads of the data pipeline.
        max_unusable: share of the images that may be unreadable or broken before the run stops.
        channels_last: store images and convolutions in memory with the channels last.
        log_every: steps between two records of metrics.
        evaluate_every: measure k-NN of features and codes every this many epochs, on a part of the images
            that is bounded; 0 = at the end alone.
        tracker: give metrics and configuration to Weights & Biases or to MLflow, too.
        save_every: steps between two checkpoints.
        keep: number of checkpoints to keep, the newest ones.
    """

    data: dict[str, float] | str = "digits"
    output: str = "runs/default"
    resume: Literal["auto", "never", "must"] = "auto"
    init_from: str | None = None
    teacher: tuple[str, ...] = ()
    messages: str | None = None
    method: Literal["bits", "simdino", "dino"] = "bits"
    agreement: Literal["hard", "soft", "cosine"] = "hard"
    tau: float = 0.1
    expa_type: Literal[0, 1] = 1
    prototypes: int = 65536
    freeze_last_layer: int = 0
    freeze_backbone: int = 0
    seed: int = 0
    epochs: int = 100
    max_steps: int | None = None
    minutes: float | None = None
    fewest_steps: int = 0
    batch_size: int = 256
    backbone: str = "vit_base_patch16_224"
    backbone_args: dict[str, Any] = field(default_factory=dict)
    bits: int = 256
    hidden: int = 2048
    head_std: float = 0.02
    reset_every: int | Literal["auto"] = "auto"
    beta: float | Literal["auto"] = "auto"
    eps_squared: float = 0.05
    dense: float = 0.0
    lr: float | Literal["auto"] = "auto"
    min_lr: float = 5e-5
    warmup_epochs: int | Literal["auto"] = "auto"
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    clip: float = 1.0
    drop_path: float = 0.1
    momentum: float | Literal["auto"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    cuda_graph: bool = False
    accumulate: int = 1
    checkpoint_activations: bool = False
    fsdp: bool = False
    global_size: int = Crops.global_size
    global_scale: tuple[float, float] = Crops.global_scale
    local_crops: int = Crops.local_crops
    local_size: int = Crops.local_size
    local_scale: tuple[float, float] = Crops.local_scale
    low_resolution: float = 0.0
    low_resolution_sizes: tuple[int, int] | None = None
    augment: Literal["photos", "overhead", "microscopy", "documents", "plants", "digits"] = "photos"
    flip: float = Crops.flip
    flip_vertical: float = Crops.flip_vertical
    right_angles: float = Crops.right_angles
    rotate: float = Crops.rotate
    shear: float = Crops.shear
    jitter: tuple[float, float, float, float] = Crops.jitter
    jitter_p: float = Crops.jitter_p
    gray: float = Crops.gray
    blur: tuple[float, float, float] = Crops.blur
    solarize: float = Crops.solarize
    posterize: float = Crops.posterize
    mean: tuple[float, ...] = Crops.mean
    std: tuple[float, ...] = Crops.std
    channels: int = Crops.channels
    pixel_range: tuple[float, float] | None = Crops.pixel_range
    eval_crop: float = 0.875
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 4
    max_unusable: float = 0.01
    channels_last: bool = False
    log_every: int = 50
    evaluate_every: int = 0
    tracker: Literal["wandb", "mlflow"] | None = None
    save_every: int = 1000
    keep: int = 3

    # Whether the precision was left to the device, so that a run that has begun elsewhere may keep its own.
    precision_is_open: ClassVar[bool] = False

    def __post_init__(self):
        for key in ("output", "init_from", "messages"):  # ~ in a recipe and from Python, too
            if isinstance(value := getattr(self, key), str):
                object.__setattr__(self, key, os.path.expanduser(value))
        teachers = [self.teacher] if isinstance(self.teacher, str) else self.teacher
        object.__setattr__(self, "teacher", tuple(map(os.path.expanduser, teachers)))
        check_limits(vars(self), LIMITS)
        for key in ("output", "init_from", "messages"):  # empty where a variable of the shell is not set
            if getattr(self, key) == "":
                raise ValueError(f"{key}: expected a path, got an empty string")
        if self.teacher_is_frozen:
            self._check_frozen_teacher()
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of batch_size = {self.batch_size}, got {self.accumulate}"
            )
        if (
            self.cuda_graph and self.checkpoint_activations
        ):  # it reads a random state, which a capture must not
            raise ValueError("cuda_graph: expected false with checkpoint_activations, got true")
        if self.dense and self.method != "bits":
            raise ValueError(f"dense: expected 0 with method {self.method}, got {self.dense:g}")
        if not self.data:
            raise ValueError(f"data: expected a source of images, got {self.data!r}")
        for source in [self.data] if isinstance(self.data, str) else self.data:
            check_address(source)
        if isinstance(self.data, dict):
            for name, weight in self.data.items():
                if not WEIGHTS[0] <= weight <= WEIGHTS[1]:
                    raise ValueError(f"data: expected a weight from 1e-6 to 1e6 for {name}, got {weight}")
        if self.evaluate_every and self.fsdp:  # a rank alone cannot pass images through its shard
            raise ValueError(f"evaluate_every: expected 0 with fsdp, got {self.evaluate_every}")
        for key, value in without_colors(self).items():
            object.__setattr__(self, key, value)
        self.crops  # noqa: B018  (its own checks)
        if self.low_resolution:
            check_low_sizes(self)
        if self.precision == "auto":  # last, because it imports torch, which no error needs
            object.__setattr__(self, "precision_is_open", True)
            object.__setattr__(self, "precision", "bf16" if computes_in_bf16(self.device) else "fp32")

    def _check_frozen_teacher(self) -> None:
        """Raise ValueError for keys that have no meaning where the teacher does not move."""
        source = "teacher" if self.teacher else "messages"
        if "" in self.teacher:
            raise ValueError("teacher: expected a path or a name, got an empty string")
        if self.teacher and self.messages is not None:
            raise ValueError(f"messages: expected none beside a teacher, got {self.messages}")
        if len(self.teacher) > self.bits:
            raise ValueError(
                f"teacher: expected at most as many as bits, {self.bits}, got {len(self.teacher)}"
            )
        if self.messages is not None and self.minutes is not None and self.max_steps is None:
            raise ValueError(
                f"minutes: expected none with messages, which are those of so many epochs, got "
                f"{self.minutes:g}; give --epochs"
            )
        if self.messages is not None and self.low_resolution:
            raise ValueError(
                "low_resolution: expected 0 with messages, which are those of crops of one resolution, got "
                f"{self.low_resolution:g}"
            )
        for key, values, why in (
            ("method", ("bits",), "whose targets are bits"),
            ("agreement", ("hard",), "whose targets are bits"),
            ("momentum", ("auto",), "which has no moving average"),
            ("reset_every", ("auto", 0), "whose code does not change with a new head"),
            ("dense", (0,), "which sends no bits of patches"),
        ):
            if (value := getattr(self, key)) not in values:
                raise ValueError(f"{key}: expected {values[-1]} with {source}, {why}, got {value}")

    @property
    def teacher_is_frozen(self) -> bool:
        """Whether the messages are those of a teacher that does not move, in memory or before the run."""
        return bool(self.teacher) or self.messages is not None

    def steps(self, epoch_steps: int) -> int:
        """Number of steps of the run, from that of an epoch; its minutes must have been settled."""
        return min(self.epochs * epoch_steps, self.max_steps or self.epochs * epoch_steps)

    @property
    def crops(self) -> Crops:
        """The part of the configuration that describes the crops."""
        return Crops(**{f.name: getattr(self, f.name) for f in fields(Crops)})

    @property
    def low_sizes(self) -> tuple[int, int]:
        """Sides of the global and the local crops in the steps that `low_resolution` is the share of."""
        return self.low_resolution_sizes or (self.global_size // 2, self.local_size // 2)

    @property
    def steps_are_open(self) -> bool:
        """Whether the number of steps is still to be chosen from `minutes`. The choice is noted as epochs and
        max_steps, beside the minutes."""
        return self.minutes is not None and self.max_steps is None

    @property
    def open_keys(self) -> tuple[str, ...]:
        """The keys that are chosen where `steps_are_open`."""
        return ("epochs", "max_steps", "batch_size") if self.fewest_steps else ("epochs", "max_steps")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to a run's config.yaml (tuples as lists)."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    def differences(self, other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Keys that differ in another run's configuration, with (its value, this one's), without the
        incidental ones. A key that it lacks, because it is of an earlier version, had its default."""
        values, other = self.as_dict(), PretrainConfig().as_dict() | other
        keys = [key for key in values if key not in INCIDENTAL]
        if self.steps_are_open:
            keys = [key for key in keys if key not in self.open_keys]
        sources = ("data", "init_from", "teacher", "messages")
        pairs = {key: (other.get(key), values[key]) for key in keys}
        return {
            key: (was, now)
            for key, (was, now) in pairs.items()
            if was != now and not (key in sources and located(was) == located(now))
        }


def check_low_sizes(config: PretrainConfig) -> None:
    """Raise ValueError where crops of low resolution would not be smaller than the others."""
    sizes, full = config.low_sizes, (config.global_size, config.local_size)
    if not (1 <= sizes[0] < full[0] and 1 <= sizes[1] <= full[1]):
        raise ValueError(
            f"low_resolution_sizes: expected less than global_size = {full[0]} and at most local_size = "
            f"{full[1]}, got {list(sizes)}"
        )


def computes_in_bf16(device: str) -> bool:
    """Whether a device, or with "auto" the one that will be taken, multiplies matrices of bf16 faster than of
    fp32. Of processors that is known for those of x86 with AVX-512 BF16 or AMX."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return True
    features = torch.cpu.get_capabilities()
    return any(features.get(name) for name in ("avx512_bf16", "amx_bf16"))


def located(source: Any) -> Any:
    """A source of images or of weights, or several of them, with absolute paths, so that it means the same
    from any directory. Addresses, and names of standard sets and of timm's models, stay."""
    from bincomm.data.standard import SETS

    if isinstance(source, dict):
        return {located(name): weight for name, weight in source.items()}
    if isinstance(source, tuple | list):
        return [located(name) for name in source]
    if not isinstance(source, str) or source in {"digits", *SETS} or is_address(source):
        return source
    path = os.path.abspath(expand_home(source))
    is_shards = glob.has_magic(source) or source.endswith((".tar", ".parquet"))
    is_path = is_shards or os.path.exists(path) or os.sep in source
    return path if is_path else source


def read_config(run: Path, key: str) -> dict[str, Any]:
    """The content of a run's config.yaml.

    Raises:
        ValueError: it cannot be read; the message begins with `key`, the argument that named the run.
    """
    try:
        return dict(read_yaml(run / "config.yaml"))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{key}: {run} holds no run whose config.yaml can be read: {error}") from error
