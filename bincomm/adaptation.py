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
from bincomm.evaluation.measure import classify, device_of, look_at
from bincomm.evaluation.pretrained import Pretrained
from bincomm.files import write_json
from bincomm.pretraining import pretrain
from bincomm.recipes import read_recipe
from bincomm.weights import read_metadata

# What is not taken over from the run that a backbone comes from, besides what the recipe says.
OWN = ("data", "output", "resume", "init_from", "device")
# What belongs to the weights, whatever the recipe says.
SOURCES = ("backbone", "backbone_args", "mean", "std")


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
    inherited = keys_taken(source)
    if not inherited and keys.get("backbone") is None:
        raise ValueError(f"from: {source} does not say of which backbone it is; say --backbone")
    recipe_keys = read_recipe(recipe)
    taken = {key: value for key, value in inherited.items() if key not in recipe_keys or key in SOURCES}
    return configure_run(recipe, **{**taken, **keys, "init_from": source})


def keys_taken(source: str) -> dict[str, Any]:
    """What an adaptation takes over from its source: of a run all keys but `OWN`, else `SOURCES`."""
    theirs, kept = read_metadata(source, "from"), list(SOURCES)
    if os.path.isdir(os.path.expanduser(source)):
        theirs |= read_config(Path(source).expanduser(), "from")
        kept = [f.name for f in fields(PretrainConfig) if f.name not in OWN]
    return {key: theirs[key] for key in kept if key in theirs}


def adapt(config: PretrainConfig) -> dict[str, Any] | None:
    """Pretrain the backbone that `config.init_from` names on `config.data`, or go on with that; returns what
    adapt.json holds: k-NN and linear probe, before and after, on the target's labeled images, None each
    where it has none. Where there are several ranks all call it, and those after the first return None.

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
    found = evaluation_sources(config.data, open_source(config.data))
    if found is not None:
        gallery, queries, held_out = found
        device = device_of(config)
        for name, weights in (("before", config.init_from), ("after", config.output)):
            _, teacher = create_networks(replace(config, init_from=weights), device)
            result[name] = classify(*look_at(Pretrained.of(teacher, config, device), (gallery, queries)))
        result |= {
            "gallery_images": len(gallery.images),
            "query_images": len(queries.images),
            "queries_held_out": held_out,
        }
    write_json(output / "adapt.json", result)
    return result


def summary(result: dict[str, Any], output: str) -> str:
    """What a finished adaptation has to say."""
    if result["before"] is None:
        lines = [
            "\nnothing could be measured: the data has no images with labels (folders named after two "
            "classes or more)"
        ]
    else:
        size = f"{result['query_images']} queries in {result['gallery_images']} images"
        lines = [f"\n{size} of {result['data']}{'':6}before   after"]
        for key, name in (("knn", "k-NN, k=20"), ("linear", "linear probe")):
            lines.append(f"  {name:20} {result['before'][key]:7.2%} {result['after'][key]:7.2%}")
        if not result["queries_held_out"]:
            lines.append("  (the queries' images, not their labels, were seen in adapting)")
    return "\n".join([*lines, f"in {output}: backbone.safetensors, adapt.json, and what else a run leaves"])
