"""The trained backbone as a model that timm, transformers and the Hugging Face Hub read."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch

from bincomm.config import PretrainConfig
from bincomm.files import write_file, write_json
from bincomm.networks import Network, create_backbone
from bincomm.weights import WEIGHTS_FILE

# What timm says of the weights that it has by this name: another size for tests, where they come from.
OF_OTHER_WEIGHTS = (
    *("url", "file", "hf_hub_id", "hf_hub_filename", "source", "tag", "license", "description", "origin_url"),
    *("paper_name", "paper_ids", "notes", "label_offset", "label_names", "label_descriptions"),
    *("test_input_size", "test_crop_pct", "test_pool_size", "min_input_size"),
)
# What timm says of the network itself: the layers that it replaces for other channels and for classes.
OF_THE_NETWORK = ("fixed_input_size", "first_conv", "classifier")


def export_backbone(teacher: Network, config: PretrainConfig, run: Path) -> None:
    """Write the teacher's backbone to model.safetensors, and to config.json how timm builds it and how it was
    evaluated: size, crop, mean and std. The metadata of the weights say the same, as arguments of
    `timm.create_model`, so that bincomm needs no other file."""
    # Copies, because safetensors refuses weights that a backbone uses twice, under two names.
    weights = {
        name: value.to("cpu", copy=True).contiguous() for name, value in teacher.backbone.state_dict().items()
    }
    backbone, arguments = create_backbone(
        config.backbone, config.global_size, in_chans=config.channels, **config.backbone_args
    )
    evaluated = {
        "num_classes": 0,
        "interpolation": "bicubic",
        "crop_mode": "center",
        "input_size": [config.channels, config.global_size, config.global_size],
        "crop_pct": config.eval_crop,
        "mean": list(config.mean),
        "std": list(config.std),
    }
    overlay = {**dict.fromkeys(OF_OTHER_WEIGHTS), "custom_load": False, **evaluated}
    created = json.dumps({**arguments, "pretrained_cfg_overlay": overlay})
    # transformers below 5 refuses weights that do not say that they are PyTorch's.
    metadata = {"create_model": created, "format": "pt"}
    # What timm has no word for.
    pixels = {} if config.pixel_range is None else {"pixel_range": list(config.pixel_range)}
    if pixels:
        metadata["pixels"] = json.dumps(pixels)
    data = safetensors.torch.save(weights, metadata=metadata)
    write_file(run / WEIGHTS_FILE, lambda file: file.writelines(with_sorted_metadata(data)))

    known: Any = backbone.pretrained_cfg
    name, classes = arguments.pop("model_name"), arguments.pop("num_classes")
    write_json(
        run / "config.json",
        {
            "architecture": name.partition(".")[0],  # without the tag of timm's own weights
            "num_classes": classes,
            "num_features": backbone.num_features,
            "model_args": arguments,
            **pixels,
            "pretrained_cfg": {**{key: known[key] for key in OF_THE_NETWORK if key in known}, **evaluated},
        },
    )


def with_sorted_metadata(data: bytes) -> list[bytes | memoryview]:
    """The parts of a safetensors file, its metadata sorted by name: safetensors writes them in random order,
    and two equal runs leave equal files."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return [len(text).to_bytes(8, "little"), text, memoryview(data)[start:]]
