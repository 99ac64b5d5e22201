"""The model card of a run: README.md in its directory, as hubs of models show it."""

import json
import logging
import os
import string
from pathlib import Path
from typing import Any

from bincomm.config import PretrainConfig
from bincomm.evaluation.run import accuracies, trained_figures
from bincomm.files import write_text

logger = logging.getLogger(__name__)

# Its first lines tell a card from a README.md of the user's. The weights are not this project's to license.
FRONT_MATTER = """\
---
# Written by bincomm, without a license: these weights belong to whoever trained them, who may add one here.
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- bincomm
- image-feature-extraction
- self-supervised-learning
- timm
- transformers
---
"""
METHODS = {
    "bits": "by discrete communication ([arXiv 2602.09764](https://arxiv.org/abs/2602.09764))",
    "simdino": "by SimDINO ([arXiv 2502.10385](https://arxiv.org/abs/2502.10385))",
    "dino": "by DINO ([arXiv 2104.14294](https://arxiv.org/abs/2104.14294))",
}
LOADING = """\
## Load it

MODEL is the folder of this file, or `hf-hub:NAME` in place of `local-dir:MODEL`.

```python
import timm

model = timm.create_model("local-dir:MODEL", pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(transform(image).unsqueeze(0))  # of an RGB image of Pillow
```

transformers: `AutoModel.from_pretrained("MODEL")`, whose `pooler_output` these features are, and
`AutoImageProcessor.from_pretrained("MODEL")`. bincomm: `bincomm.load_pretrained("MODEL").encode(image)`.
"""
LOADING_VALUES = """\
## Load it

MODEL is the folder of this file, or `hf-hub:NAME` in place of `local-dir:MODEL`.

```python
import timm

model = timm.create_model("local-dir:MODEL", pretrained=True, num_classes=0).eval()
features = model(images)  # ({shape}): center crops, minus mean over std, of values from 0 to 1
```

bincomm reads files and arrays as in training: `bincomm.load_pretrained("MODEL").encode("image.tif")`.
"""
LICENSE = """\
## License

These weights belong to whoever trained them, who has not stated a license here. The code of bincomm is under
the Apache License 2.0.
"""


def write_model_card(
    run: Path, config: PretrainConfig, images: int, result: dict[str, Any], adapted: bool = True
) -> None:
    """Write README.md into a run's directory, unless there is one that bincomm did not write.

    Args:
        run: the directory.
        config: of the run.
        images: number of images that it was trained on.
        result: what its result.json holds.
        adapted: whether the weights are those of the end of the run; False: those that it began with, which
            it made worse.
    """
    path = run / "README.md"
    if path.exists() and not path.read_bytes().startswith(FRONT_MATTER.encode()):
        logger.info("note: %s is not bincomm's, and stays as it is; there is no model card", path)
        return
    write_text(path, model_card(config, images, result, adapted))


def model_card(config: PretrainConfig, images: int, result: dict[str, Any], adapted: bool = True) -> str:
    """The text of README.md: what the network is, how to load it, its data and its figures. Equal runs have
    equal cards, whatever the machine: no times and, of paths, only the last part."""
    size, metrics = config.global_size, result["last_metrics"]
    title = f"# {config.backbone}, pretrained without labels"
    about = f"An image backbone, pretrained {METHODS[config.method]} with bincomm: images of {size} × {size} "
    about += "pixels → features."
    if not adapted:
        assert config.init_from is not None  # an adaptation begins with weights
        title = f"# {config.backbone}, as it came"
        about += f" These are the weights of {in_markdown(last_part(config.init_from))}: the run below "
        about += "adapted them to other images and made k-NN worse, so its result is not taken."
    facts = {"images": f"{images}, of {sources(config.data)}", "method": config.method}
    if config.init_from is not None:
        facts["initial weights"] = in_markdown(last_part(config.init_from))
    if config.teacher:
        facts["frozen teacher"] = ", ".join(in_markdown(last_part(weights)) for weights in config.teacher)
    if config.messages is not None:
        facts["messages of a frozen teacher"] = in_markdown(last_part(config.messages))
    if config.backbone_args:
        facts["arguments of the backbone"] = f"`{json.dumps(config.backbone_args)}`"  # names and numbers
    if "step" in metrics:
        facts["steps"] = f"{metrics['step']} of {config.batch_size} images"
    facts["bits of a message"] = str(config.bits)
    if "transmitted_bits" in metrics:
        facts["bits transmitted"] = f"{metrics['transmitted_bits']:.1f}"
    facts["center crop"] = f"{size} pixels, of images resized to {int(size / config.eval_crop)}, bicubic"
    colors = "RGB" if config.crops.rgb else f"{config.channels} channels"
    facts[f"mean, std of {colors}"] = f"{in_words(config.mean)}; {in_words(config.std)}"
    if config.pixel_range is not None:
        facts["range of pixels"] = in_words(config.pixel_range)
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    training = table(("what", "value"), list(facts.items()))
    loading = (
        LOADING if config.crops.rgb else LOADING_VALUES.format(shape=f"n, {config.channels}, {size}, {size}")
    )
    parts = (FRONT_MATTER, f"{title}\n", f"{about}\n", loading, f"## Training\n\n{training}\n")
    return "\n".join([*parts, figures(result), LICENSE])


def figures(result: dict[str, Any]) -> str:
    """The section of the k-NN accuracies that were measured at the end of the run."""
    evaluation = result["evaluation"]
    if not evaluation:
        return "## Figures\n\nNone: the images had no labels to measure with.\n"
    _, trained = trained_figures(evaluation)
    rows = [(name, f"{share:.2%}") for name, share in accuracies(result)]
    text = f"{trained['query_images']} queries in {trained['gallery_images']} images, at the end of the run"
    if not evaluation["queries_held_out"]:
        text += "; the queries' images, not their labels, were used in training"
    return f"## Figures\n\n{text}.\n\n{table(('k-NN, k = 20', 'accuracy'), rows)}\n"


def table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    """A table of two columns, of Markdown."""
    return "\n".join(f"| {left} | {right} |" for left, right in [head, ("---", "---"), *rows])


def sources(data: str | dict[str, float]) -> str:
    """The sources of the images by the last parts of their paths, and the weights of several, in Markdown."""
    if isinstance(data, str):
        return in_markdown(last_part(data))
    return ", ".join(f"{in_markdown(last_part(name))} (weight {weight:g})" for name, weight in data.items())


def last_part(path: str) -> str:
    """The last part of a path, which says nothing of the machine; of list.txt@FOLDER that of the list."""
    if ".txt@" in path.lower():
        path = path[: path.lower().rindex(".txt@") + len(".txt")]
    return os.path.basename(path.rstrip(os.sep)) or path


def in_words(numbers: tuple[float, ...]) -> str:
    """Numbers separated by commas."""
    return ", ".join(f"{number:g}" for number in numbers)


def in_markdown(text: str) -> str:
    """Text, such as a name of a file, as Markdown that shows it as it is: a backslash takes the meaning of
    punctuation, HTML's included, and what does not print, as the end of a line, becomes its number."""
    printed = "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in text)
    return "".join(f"\\{one}" if one in string.punctuation else one for one in printed)
