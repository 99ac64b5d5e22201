"""Domain adaptation: a pretrained backbone learns on, by the same objective, from images of a target."""

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from bincomm.building import create_networks
from bincomm.config import PretrainConfig, read_config
from bincomm.config import configure as configure_run
from bincomm.data.sources import evaluation_sources, open_source
from bincomm.evaluation.evaluate import figure
from bincomm.evaluation.pretrained import Pretrained, evaluation_device
from bincomm.evaluation.run import evaluate_reproducibly
from bincomm.files import write_json
from bincomm.pretraining import pretrain
from bincomm.recipes import read_recipe
from bincomm.weights import read_metadata

# What is not taken over from the run that a backbone comes from, besides what the recipe says.
TARGET_KEYS = ("data", "output", "resume", "init_from", "device")
# What belongs to the weights, whatever the recipe says.
WEIGHTS_KEYS = ("backbone", "backbone_args", "mean", "std")


def configure(source: str | Path, recipe: str = "adapt", **keys: Any) -> PretrainConfig:
    """The configuration of an adaptation: the keys given, before the recipe's, before those of the run that
    the backbone comes from, before the defaults. The name and arguments of the backbone and its mean and std
    are the source's, whatever the recipe.

    Args:
        source: a run's directory, a .safetensors file, or a timm model with pretrained weights.
        recipe: the name of one, or the path of a YAML file.
        keys: of `PretrainConfig`, without init_from.

    Raises:
        ValueError: there is no such source, or what `bincomm.config.configure` raises it for.
    """
    source = os.fspath(source)
    if keys.get("init_from") is not None:
        raise ValueError("init_from: adapt begins with the backbone that --from names")
    inherited = inherited_keys(source)
    if not inherited and keys.get("backbone") is None:
        raise ValueError(f"from: {source} does not say of which backbone it is; say --backbone")
    recipe_keys = read_recipe(recipe)
    taken = {key: value for key, value in inherited.items() if key not in recipe_keys or key in WEIGHTS_KEYS}
    return configure_run(recipe, **{**taken, **keys, "init_from": source})


def inherited_keys(source: str) -> dict[str, Any]:
    """What an adaptation takes over from its source: of a run all keys but `TARGET_KEYS`, else
    `WEIGHTS_KEYS`."""
    keys, names = read_metadata(source, "from"), list(WEIGHTS_KEYS)
    if os.path.isdir(os.path.expanduser(source)):
        keys |= read_config(Path(source).expanduser(), "from")
        names = [field.name for field in fields(PretrainConfig) if field.name not in TARGET_KEYS]
    return {name: keys[name] for name in names if name in keys}


def adapt(config: PretrainConfig) -> dict[str, Any] | None:
    """Pretrain the backbone that `config.init_from` names on `config.data`, or go on with that.

    Where there are several ranks all call it, and those after the first return None.

    Returns:
        What adapt.json holds: "from", "data", and "before" and "after", which are k-NN and linear probe on
        the target's labeled images as `bincomm.evaluation.evaluate.evaluate` returns them, None each where
        it has none; else with "queries_held_out", whether the queries were held out from training.

    Raises:
        ValueError: there is no `config.init_from`.
        Other errors are those of `pretrain`.
    """
    if config.init_from is None:
        raise ValueError("init_from: expected weights to begin with, got none")
    output = Path(config.output)
    if pretrain(config) is None:
        return None
    if (output / "adapt.json").exists():
        return json.loads((output / "adapt.json").read_text())
    result: dict[str, Any] = {"from": config.init_from, "data": config.data, "before": None, "after": None}
    sources = evaluation_sources(config.data, open_source(config.data))
    if sources is not None:
        gallery, queries, held_out = sources
        device = evaluation_device(config)
        for name, weights in (("before", config.init_from), ("after", config.output)):
            _, teacher = create_networks(replace(config, init_from=weights), device)
            model = Pretrained.of(teacher, config, device)
            result[name] = evaluate_reproducibly(model, gallery, queries, ("knn", "linear"))
        result["queries_held_out"] = held_out
    write_json(output / "adapt.json", result)
    return result


def summary(result: dict[str, Any], output: str) -> str:
    """What a finished adaptation prints, from what its adapt.json holds and its directory."""
    before, after = result["before"], result["after"]
    if before is None:
        lines = [
            "\nnothing could be measured: the data has no images with labels (folders named after two "
            "classes or more)"
        ]
    else:
        size = f"{after['query_images']} queries in {after['gallery_images']} images"
        lines = [f"\n{size} of {result['data']}{'':6}before   after"]
        for path, title in ((("knn", "20"), "k-NN, k=20"), (("linear", "accuracy"), "linear probe")):
            lines.append(f"  {title:20} {figure(before, *path):7.2%} {figure(after, *path):7.2%}")
        if not result["queries_held_out"]:
            lines.append("  (the queries' images, not their labels, were seen in adapting)")
    return "\n".join([*lines, f"in {output}: backbone.safetensors, adapt.json, and what else a run leaves"])
