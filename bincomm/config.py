"""Configuration of a pretraining run: one flat set of keys for recipes, command line and Python."""

import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from bincomm.data.crops import Crops
from bincomm.recipes import choose_recipe, read_recipe

# Keys that change how a run is carried out but not what it computes: a run may be resumed with others.
# The last row changes results by rounding, and which paths drop_path drops.
INCIDENTAL = (
    "output", "threads", "save_every", "max_unusable", "resume", "keep",
    "compile", "cuda_graph", "accumulate", "checkpoint_activations", "fsdp",
)  # fmt: skip


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that determines a pretraining run.

    The defaults are the paper's: ViT-B/16, ImageNet-1K, 100 epochs.

    Args:
        data: a folder of images (nested or flat), tar shards (data-{000..127}.tar), a .txt file of image
            paths, a standard set by name ("cifar10"), or "digits"; or several such with weights, the shares
            of an epoch's images from each: {"photos": 3, "cifar10": 1}.
        output: the run's directory; made if missing.
        resume: auto goes on with the unfinished run in output where there is one; never refuses a directory
            that holds a run; must refuses one that holds none.
        init_from: weights that the backbone begins with: a run's directory, a .safetensors file, or a timm
            model with pretrained weights, by name. The head is new.
        method: what is trained: the paper's bits, or of its baselines SimDINO or DINO.
        agreement: of the method bits: hard, the teacher's bits; soft, sigmoid(logit/tau) in their place;
            cosine of the student's logits and the bits as ±1.
        tau: temperature of soft agreement.
        expa_type: of SimDINO: 1 takes the coding rate of the mean of student and teacher, 0 of the student.
        prototypes: of DINO; its bottleneck has as many dimensions as bits says.
        seed: determines initialization, order of images and augmentations.
        epochs: passes over the data.
        max_steps: end after so many steps, whatever epochs says; the schedules then span these.
        batch_size: images a step, on all GPUs together.
        backbone: a timm model name.
        backbone_args: further arguments of timm.create_model, for example {"layers": [1, 1, 1, 1]}.
        bits: K, the bits of a message.
        hidden: width of the head's two hidden layers.
        head_std: standard deviation of the head's initial weights. Small logits strengthen the coding rate: a
            narrow or shallow backbone needs a larger one than the default.
        reset_every: draw the head anew every so many epochs; 0 = never.
        beta: β, weight of the coding rate. Bits dying: raise it; agreement stuck at ln 2: lower it.
        eps_squared: ε² of the coding rate.
        lr: peak learning rate for a batch of 256; scaled in proportion to batch_size.
        min_lr: learning rate at the end.
        warmup_epochs: epochs of linear warm-up, at most a quarter of the run.
        weight_decay: at the start; none on biases and other one-dimensional parameters.
        weight_decay_end: at the end, reached by cosine.
        clip: largest gradient norm of a parameter tensor; 0 = no clipping.
        drop_path: stochastic depth rate of the student.
        momentum: of the teacher's moving average at the start; 1 at the end, reached by cosine.
        precision: of the networks' forward pass; the losses are always in fp32.
        compile: torch.compile both networks; auto does so on a GPU.
        cuda_graph: replay a step's launches from a CUDA graph; for small networks on one GPU, whose steps are
            shorter than launching them.
        accumulate: parts a step's images are cut into to need less memory, for one more forward pass; the
            loss stays that of all images.
        checkpoint_activations: compute the backbone's activations again in the backward pass to need less
            memory.
        fsdp: split parameters and optimizer over the GPUs (FSDP2), for backbones that do not fit on one.
        global_size: side of the two global crops, pixels.
        global_scale: range of the area of a global crop, as a share of the image.
        local_crops: number of local crops, which the student alone sees.
        local_size: side of the local crops, pixels.
        local_scale: range of the area of a local crop.
        flip: probability of a horizontal flip.
        jitter: strengths of brightness, contrast, saturation and hue jitter, as in torchvision.
        jitter_p: probability of color jitter.
        gray: probability of a gray image.
        blur: probabilities of a blur for global 1, global 2 and the locals.
        solarize: probability of solarizing global 2.
        mean: by which colors from 0 to 1 are normalized, with std; the defaults are ImageNet's, and weights
            to begin with may want others.
        std: as mean.
        eval_crop: share of the resized image's side that evaluation looks at, in its center.
        device: auto takes the GPU when there is one.
        threads: CPU threads of the data pipeline.
        max_unusable: share of the images that may be unreadable or broken before the run stops.
        channels_last: lay images and convolutions out in memory with the channels last.
        log_every: steps between two lines of metrics.
        save_every: steps between two checkpoints.
        keep: checkpoints that are kept, the newest.
    """

    data: dict[str, float] | str = "digits"
    output: str = "runs/default"
    resume: Literal["auto", "never", "must"] = "auto"
    init_from: str | None = None
    method: Literal["bits", "simdino", "dino"] = "bits"
    agreement: Literal["hard", "soft", "cosine"] = "hard"
    tau: float = 0.1
    expa_type: Literal[0, 1] = 1
    prototypes: int = 65536
    seed: int = 0
    epochs: int = 100
    max_steps: int | None = None
    batch_size: int = 256
    backbone: str = "vit_base_patch16_224"
    backbone_args: dict[str, Any] = field(default_factory=dict)
    bits: int = 256
    hidden: int = 2048
    head_std: float = 0.02
    reset_every: int = 10
    beta: float = 0.1
    eps_squared: float = 0.05
    lr: float = 5e-4
    min_lr: float = 5e-5
    warmup_epochs: int = 10
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    clip: float = 1.0
    drop_path: float = 0.1
    momentum: float = 0.996
    precision: Literal["bf16", "fp32"] = "bf16"
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
    flip: float = Crops.flip
    jitter: tuple[float, float, float, float] = Crops.jitter
    jitter_p: float = Crops.jitter_p
    gray: float = Crops.gray
    blur: tuple[float, float, float] = Crops.blur
    solarize: float = Crops.solarize
    mean: tuple[float, float, float] = Crops.mean
    std: tuple[float, float, float] = Crops.std
    eval_crop: float = 0.875
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 4
    max_unusable: float = 0.01
    channels_last: bool = False
    log_every: int = 50
    save_every: int = 1000
    keep: int = 3

    def __post_init__(self):
        at_least = {
            "epochs": 1, "batch_size": 1, "bits": 1, "hidden": 1, "reset_every": 0, "beta": 0, "lr": 0,
            "min_lr": 0, "warmup_epochs": 0, "weight_decay": 0, "weight_decay_end": 0, "clip": 0,
            "threads": 1, "log_every": 1, "save_every": 1, "keep": 1, "accumulate": 1, "prototypes": 1,
        }  # fmt: skip
        for key, smallest in at_least.items():
            if not getattr(self, key) >= smallest:
                raise ValueError(f"{key}: expected at least {smallest}, got {getattr(self, key)}")
        for key, value in self.as_dict().items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key}: expected a finite number, got {value}")
        for key in ("output", "init_from"):  # as from a variable that is not set
            if getattr(self, key) == "":
                raise ValueError(f"{key}: expected a path, got an empty string")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of batch_size = {self.batch_size}, got {self.accumulate}"
            )
        if self.cuda_graph and self.checkpoint_activations:  # it reads a random state, which no capture may
            raise ValueError("cuda_graph: expected false with checkpoint_activations, got true")
        if not self.data:
            raise ValueError(f"data: expected a source of images, got {self.data!r}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, got {self.max_steps}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected from 0 to 2⁶³ - 1, got {self.seed}")
        for key in ("eps_squared", "head_std", "tau"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}: expected a number > 0, got {getattr(self, key)}")
        for key in ("drop_path", "momentum"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: expected a number from 0 to 1, got {getattr(self, key)}")
        if not 0 <= self.max_unusable <= 1:
            raise ValueError(f"max_unusable: expected a share from 0 to 1, got {self.max_unusable}")
        if not 0 < self.eval_crop <= 1:
            raise ValueError(f"eval_crop: expected a number above 0 and at most 1, got {self.eval_crop}")
        self.crops  # noqa: B018  (its own checks)

    @property
    def crops(self) -> Crops:
        """The part of the configuration that describes the crops."""
        return Crops(**{f.name: getattr(self, f.name) for f in fields(Crops)})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to a run's config.yaml (tuples as lists)."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    def differences(self, other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Keys that differ in another run's configuration, with (its value, this one's); incidental ones are
        left out. A key that it lacks, as one of an earlier version does, had its default."""
        from bincomm.data.standard import SETS

        values, other = self.as_dict(), PretrainConfig().as_dict() | other
        keys = [key for key in values if key not in INCIDENTAL]
        named = {"digits", *SETS}
        for key in ("data", "init_from"):
            paths = [v for v in (values[key], other.get(key)) if isinstance(v, str) and v not in named]
            if len(paths) == 2 and len({os.path.abspath(os.path.expanduser(path)) for path in paths}) == 1:
                keys.remove(key)  # two spellings of one path
        return {key: (other.get(key), values[key]) for key in keys if other.get(key) != values[key]}


def read_config(run: Path, key: str) -> dict[str, Any]:
    """What a run's config.yaml holds.

    Raises:
        ValueError: it cannot be read; the message begins with `key`, which the run was named by.
    """
    import yaml

    try:
        return dict(yaml.safe_load((run / "config.yaml").read_text()))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{key}: {run} holds no run whose config.yaml can be read: {error}") from error


def configure(recipe: str | None = None, **keys: Any) -> PretrainConfig:
    """The configuration of a run: the keys given, before those of a recipe, before the defaults.

    Args:
        recipe: a name in `bincomm.recipes.recipe_names()`, or a YAML file; None: what fits the images.
        keys: of `PretrainConfig`.

    Raises:
        ValueError: an unknown recipe or key, or a value that does not fit; the message names it.
        OSError: the recipe cannot be read.
    """
    from bincomm.parsing import check_keys

    keys = check_keys(keys)
    recipe = recipe or choose_recipe(keys.get("data", "digits"))
    values = check_keys(read_recipe(recipe), f"recipe {recipe}: ")
    return PretrainConfig(**{"output": f"runs/{Path(recipe).stem}", **values, **keys})


def configure_comparison(recipe: str | None = None, **keys: Any) -> PretrainConfig:
    """As `configure`, for `bincomm.comparison.compare`: without an output among the keys it is
    runs/compare-RECIPE, whatever the recipe says.

    Raises:
        ValueError: the key method is given, or as `configure`.
    """
    from bincomm.parsing import check_keys

    keys = check_keys(keys)
    if keys.get("method") is not None:
        raise ValueError("method: compare takes --methods, for example --methods=bits-reset,dino")
    recipe = recipe or choose_recipe(keys.get("data", "digits"))
    return configure(recipe, **{"output": f"runs/compare-{Path(recipe).stem}", **keys})
