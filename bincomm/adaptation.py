"""Domain adaptation: training of a pretrained backbone continues on images of a target domain."""

import json
import math
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from bincomm.building import create_networks
from bincomm.config import KEYS_OF_METHODS, KEYS_OF_MOVING_TEACHERS, PretrainConfig, read_config
from bincomm.configuration import configure as configure_run
from bincomm.configuration import without_keys_of_presets
from bincomm.data.sources import evaluation_sources, open_source
from bincomm.engine.export import export_backbone
from bincomm.engine.run import read_result
from bincomm.evaluation.evaluate import figure
from bincomm.evaluation.model_card import write_model_card
from bincomm.evaluation.pretrained import Pretrained, evaluation_device
from bincomm.evaluation.run import evaluate_reproducibly
from bincomm.files import expand_home, write_file, write_json
from bincomm.pretraining import pretrain
from bincomm.recipes import read_recipe
from bincomm.weights import WEIGHTS_FILE, read_metadata

# Keys that are not taken over from the run that the weights come from.
TARGET_KEYS = ("data", "output", "resume", "init_from", "teacher", "messages", "device", "minutes")
# Keys that belong to the weights, whatever the recipe says.
PIXEL_KEYS = ("mean", "std", "channels", "pixel_range")
WEIGHTS_KEYS = ("backbone", "backbone_args", *PIXEL_KEYS)
ADAPTED_FILE = "adapted.safetensors"  # the adapted backbone, where it is not the better one
KNN = ("knn", "20")


def configure(weights: str | Path, recipe: str = "adapt", **keys: Any) -> PretrainConfig:
    """The configuration of an adaptation: the keys given, before the recipe's, before those of the run that
    the weights come from, before the defaults. The name and arguments of the backbone, mean, std, channels
    and pixel_range are those of the weights, whatever the recipe says; the last four only where neither that
    nor the keys ask for another number of channels.

    Args:
        weights: a run's directory, a .safetensors file, or the name of a timm model with pretrained weights.
        recipe: the name of a recipe, or the path of a YAML file.
        keys: of `PretrainConfig`, without init_from.

    Raises:
        ValueError: there are no such weights, or what `bincomm.configuration.configure` raises it for.
    """
    weights = os.fspath(weights)
    if keys.get("init_from") is not None:
        raise ValueError("init_from: adapt sets it to its weights; leave it out")
    inherited = inherited_keys(weights)
    if not inherited and keys.get("backbone") is None:
        raise ValueError(f"weights: {weights} does not name its backbone; give its timm name as backbone")
    known, asked = inherited.get("backbone"), keys.get("backbone")
    if known and asked and known.partition(".")[0] != asked.partition(".")[0]:  # whatever the weights' tags
        raise ValueError(f"backbone: expected {known}, as {weights} says, got {asked}; leave it out")
    recipe_keys = read_recipe(recipe)
    taken = {key: value for key, value in inherited.items() if key not in recipe_keys or key in WEIGHTS_KEYS}
    asked = keys.get("channels", recipe_keys.get("channels"))
    if asked not in (None, inherited.get("channels", 3)):  # and then they have other numbers
        taken = {key: value for key, value in taken.items() if key not in PIXEL_KEYS}
    if keys.get("method", inherited.get("method")) != inherited.get("method"):
        taken = {key: value for key, value in taken.items() if key not in KEYS_OF_METHODS["bits"]}
    if keys.get("teacher") or keys.get("messages"):
        taken = {key: value for key, value in taken.items() if key not in KEYS_OF_MOVING_TEACHERS}
    of_run = inherited.get("augment", PretrainConfig.augment)
    augment = keys.get("augment", recipe_keys.get("augment", of_run))
    if augment != of_run:
        taken.pop("augment", None)
        taken = without_keys_of_presets(taken, of_run, augment)
    if keys.get("minutes") is not None or recipe_keys.get("minutes") is not None:
        for key in ("epochs", "max_steps"):  # which would count as given, in place of the minutes
            taken.pop(key, None)
    return configure_run(recipe, **{**taken, **keys, "init_from": weights})


def inherited_keys(weights: str) -> dict[str, Any]:
    """The keys that an adaptation takes over: of a run all but `TARGET_KEYS`, and but the max_steps that came
    from minutes; of other weights `WEIGHTS_KEYS`."""
    keys, names = read_metadata(weights, "weights"), list(WEIGHTS_KEYS)
    if (expand_home(weights) / "config.yaml").exists():
        keys |= read_config(expand_home(weights), "weights")
        left_out = {*TARGET_KEYS, *(["max_steps"] if keys.get("minutes") is not None else [])}
        names = [field.name for field in fields(PretrainConfig) if field.name not in left_out]
    return {name: keys[name] for name in names if name in keys}


def adapt(config: PretrainConfig) -> dict[str, Any] | None:
    """Pretrain the backbone that `config.init_from` names on `config.data`, or resume an unfinished
    adaptation; keep the better backbone.

    Where the target has labels and k-NN (k = 20) is lower after than before, model.safetensors of the run is
    the backbone as it came, and adapted.safetensors the one that was adapted, which the checkpoints have,
    too. The directory, as weights, then stands for the former.

    With several ranks all call it, and all but the first return None.

    Returns:
        The content of adapt.json: "from", "data", and "before" and "after", the k-NN and linear probe on the
        target's labeled images as `bincomm.evaluation.evaluate.evaluate` returns them. Both are None if the
        target has no labels; otherwise "queries_held_out" says whether the queries were held out from
        training. "kept": which of them model.safetensors is.

    Raises:
        ValueError: `config.init_from` is None.
        Other errors are those of `pretrain`.
    """
    if config.init_from is None:
        raise ValueError("init_from: expected initial weights, got none")
    output = Path(config.output)
    if pretrain(config) is None:
        return None
    if (output / "adapt.json").exists():
        return json.loads((output / "adapt.json").read_text())
    result: dict[str, Any] = {"from": config.init_from, "data": config.data, "before": None, "after": None}
    result["kept"] = "after"
    source = open_source(config.data)
    sources = evaluation_sources(config.data, source)
    if sources is not None:
        gallery, queries, held_out = sources
        device = evaluation_device(config)
        adapted = output / ADAPTED_FILE  # there if this was interrupted below
        after = str(adapted) if adapted.exists() else config.output
        for name, weights in (("after", after), ("before", config.init_from)):
            _, network = create_networks(replace(config, init_from=weights), device)
            model = Pretrained.of(network, config, device)
            result[name] = evaluate_reproducibly(model, gallery, queries, ("knn", "linear"))
        result["queries_held_out"] = held_out
        if figure(result["after"], *KNN) < figure(result["before"], *KNN):
            result["kept"] = "before"
            if not adapted.exists():
                weights_of_run = (output / WEIGHTS_FILE).read_bytes()
                write_file(adapted, lambda file: file.write(weights_of_run))
            export_backbone(network, config, output)
            write_model_card(output, config, len(source.images), read_result(output), adapted=False)
    write_json(output / "adapt.json", result)  # the adaptation is finished
    return result


def summary(result: dict[str, Any], output: str) -> str:
    """A finished adaptation in words, from the content of its adapt.json and its directory."""
    before, after = result["before"], result["after"]
    if before is None:
        lines = [
            "\nnothing could be measured: the data has no images with labels (folders named after two "
            "classes or more)"
        ]
    else:
        size = f"{after['query_images']} queries in {after['gallery_images']} images"
        lines = [f"\n{size} of {result['data']}{'':6}before   after"]
        for path, title in ((KNN, "k-NN, k=20"), (("linear", "accuracy"), "linear probe")):
            lines.append(f"  {title:20} {figure(before, *path):7.2%} {figure(after, *path):7.2%}")
        if not result["queries_held_out"]:
            lines.append("  (the queries' images, but not their labels, were used in adapting)")
        lines.append(f"  {verdict(result)}")
    return "\n".join(
        [*lines, f"in {output}: model.safetensors, adapt.json, report.html, and the other files of a run"]
    )


def verdict(result: dict[str, Any]) -> str:
    """Whether adapting helped, and which backbone is kept, in words."""
    shares = [figure(result[name], *KNN) for name in ("before", "after")]
    points = 100 * (shares[1] - shares[0])
    error = 100 * math.sqrt(sum(share * (1 - share) for share in shares) / result["after"]["query_images"])
    known = f"k-NN changed by {points:+.2f} points, with a standard error of at most {error:.2f}"
    if result["kept"] == "before":
        return (
            f"adapting made it worse: {known}. model.safetensors is the backbone as it came; the adapted one "
            f"is {ADAPTED_FILE}"
        )
    return f"{known}; model.safetensors is the adapted backbone"
