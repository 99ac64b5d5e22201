"""The trained backbone as a file that timm loads."""

import json
from pathlib import Path

import safetensors.torch

from bincomm.config import PretrainConfig
from bincomm.files import write_file
from bincomm.networks import Network, create_backbone

# What timm says of the weights that it has by this name: another size for tests, where they come from.
OF_OTHER_WEIGHTS = (
    *("url", "file", "hf_hub_id", "hf_hub_filename", "source", "tag", "license", "description", "origin_url"),
    *("paper_name", "paper_ids", "notes", "label_offset", "label_names", "label_descriptions"),
    *("test_input_size", "test_crop_pct", "test_pool_size", "min_input_size"),
)


def export_backbone(teacher: Network, config: PretrainConfig, run: Path) -> None:
    """Write the teacher's backbone to backbone.safetensors; its metadata holds the arguments of
    `timm.create_model`, by which timm also knows how it was evaluated: size, crop, mean and std."""
    # Copies, because safetensors refuses weights that a backbone uses twice, under two names.
    weights = {
        name: value.to("cpu", copy=True).contiguous() for name, value in teacher.backbone.state_dict().items()
    }
    _, arguments = create_backbone(config.backbone, config.global_size, **config.backbone_args)
    arguments["pretrained_cfg_overlay"] = {
        **dict.fromkeys(OF_OTHER_WEIGHTS),
        "custom_load": False,
        "num_classes": 0,
        "interpolation": "bicubic",
        "crop_mode": "center",
        "input_size": [3, config.global_size, config.global_size],
        "crop_pct": config.eval_crop,
        "mean": list(config.mean),
        "std": list(config.std),
    }
    # One key: safetensors writes several in random order, and two equal runs leave equal files.
    data = safetensors.torch.save(weights, metadata={"create_model": json.dumps(arguments)})
    write_file(run / "backbone.safetensors", lambda file: file.write(data))
