"""Weights of a backbone: from a run, a .safetensors file or timm, and what they know of themselves."""

import difflib
import hashlib
import json
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from bincomm.backbone_arguments import check_backbone_arguments, check_backbone_name, is_plain_name
from bincomm.files import expand_home

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"  # in a run's directory, as timm, transformers and hubs of models name it
EARLIER_WEIGHTS_FILE = "backbone.safetensors"  # of runs of bincomm 0.1.0


def load_weights(backbone: nn.Module, source: str, argument: str = "init_from") -> None:
    """Fill a backbone from a run's directory, a .safetensors file, or timm's pretrained weights by name.

    Position embeddings are resampled to the backbone's size; weights of a classifier are left out. Weights
    for RGB are adapted to other channels, see `adapt_channels`.

    Raises:
        ValueError: there are no such weights, or they are of another backbone; the message begins with
            `argument`, which the source was named by.
    """
    weights = read_weights(source, argument)
    expected = backbone.state_dict()
    positions = [state.get("pos_embed", torch.empty(0, 0)).shape[1] for state in (weights, expected)]
    if all(positions) and positions[0] != positions[1]:
        vit: Any = backbone
        weights["pos_embed"] = resample_abs_pos_embed(
            weights["pos_embed"], vit.patch_embed.grid_size, num_prefix_tokens=vit.num_prefix_tokens
        )
    adapt_channels(weights, backbone, source, argument)
    missing = sorted(set(expected) - set(weights))
    shared = set(expected) & set(weights)
    misshapen = sorted(name for name in shared if expected[name].shape != weights[name].shape)
    if missing or misshapen:
        name, what = (missing[0], "is missing") if missing else (misshapen[0], "has another shape")
        raise ValueError(
            f"{argument}: {source} holds weights of another backbone: {name} {what} there "
            f"({len(missing)} missing, {len(misshapen)} of another shape)"
        )
    backbone.load_state_dict({name: weights[name] for name in expected})


def adapt_channels(weights: dict[str, Tensor], backbone: nn.Module, source: str, argument: str) -> None:
    """Let weights of a network for RGB fit a backbone for other channels, by timm's rule: the filters of the
    first layer are repeated over the channels, and scaled to keep their sum; for one channel they are summed.

    Raises:
        ValueError: the weights are for another number of channels than the backbone's, and than 3.
    """
    known: Any = getattr(backbone, "pretrained_cfg", {})
    first = known.get("first_conv") or ()
    expected = backbone.state_dict()
    for name in [first] if isinstance(first, str) else first:
        key = f"{name}.weight"
        if key not in weights or key not in expected or expected[key].ndim != 4:
            continue
        there, here = weights[key].shape[1], expected[key].shape[1]
        if there == here or weights[key].shape[:1] + weights[key].shape[2:] != (
            expected[key].shape[:1] + expected[key].shape[2:]
        ):
            continue
        if there != 3:
            raise ValueError(f"{argument}: {source} holds weights for {there} channels, expected {here} or 3")
        weights[key] = adapt_input_conv(here, weights[key])
        logger.info("note: the first layer of %s, for RGB, was adapted to %d channels", source, here)


def read_weights(source: str, argument: str) -> dict[str, Tensor]:
    """A backbone's weights by name; see `load_weights`."""
    file = weights_file(source, argument)
    if file is not None:
        try:
            return safetensors.torch.load_file(file)
        except (OSError, SafetensorError) as error:
            raise _unreadable(file, argument, error) from error
    with without_retries() as unreachable:
        try:
            return timm.create_model(source, pretrained=True, num_classes=0).state_dict()
        except Exception as error:  # of whatever library timm fetches them with
            reason = unreachable or " ".join(str(error).split())
            raise ValueError(f"{argument}: timm has no weights of {source} here: {reason}") from error


def hash_weights(digest: "hashlib._Hash", network: nn.Module) -> None:
    """Add the names, shapes and values of a network's weights and buffers to a checksum."""
    for name, value in network.state_dict().items():
        digest.update(f"{name}\0{value.dtype}{list(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


@contextmanager
def without_retries() -> Iterator[str]:
    """Let weights come from the disk alone where their server cannot be reached: else every attempt to reach
    it is printed, for a minute. Yields what to say then, "" where it can be reached, or through a proxy."""
    from huggingface_hub import constants

    server, unreachable, before = urlsplit(constants.ENDPOINT), "", constants.HF_HUB_OFFLINE
    if not getproxies() and not before:
        try:
            socket.create_connection((server.hostname or "", server.port or 443), timeout=5).close()
        except OSError as error:
            unreachable = f"they are not on this machine, and {server.hostname} cannot be reached: {error}"
    constants.HF_HUB_OFFLINE = before or bool(unreachable)
    try:
        yield unreachable
    finally:
        constants.HF_HUB_OFFLINE = before


def weights_file(source: str, argument: str) -> Path | None:
    """The file of a backbone's weights, given it or a run's directory; None for those of timm."""
    path = expand_home(source)
    if path.is_dir():
        for name in (WEIGHTS_FILE, EARLIER_WEIGHTS_FILE):
            if (path / name).exists():
                return path / name
        raise ValueError(f"{argument}: {source} holds no finished run (there is no {WEIGHTS_FILE})")
    if path.exists():
        return path
    if is_plain_name(source) and timm.is_model(source):
        return None
    near = difflib.get_close_matches(source, timm.list_models(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"{argument}: expected a run's directory, a .safetensors file or a timm model, got {source!r}{hint}"
    )


def _unreadable(file: Path, argument: str, error: Exception) -> ValueError:
    """The error for a file that is not safetensors; one of torch.save is named, and how to convert it."""
    try:
        with open(file, "rb") as opened:
            begin = opened.read(4)
    except OSError:
        begin = b""
    if begin[:2] == b"\x80\x02" or begin == b"PK\x03\x04":
        if file.suffix == ".ckpt":
            return ValueError(f"{argument}: {file} is a checkpoint; give the run's directory that it is of")
        return ValueError(
            f"{argument}: {file} was written by torch.save, as .pth files are, and may run code when it is "
            "loaded; convert it once to .safetensors, as docs/training.md says, and name its backbone, too"
        )
    return ValueError(f"{argument}: {file} cannot be read as safetensors: {error}")


def read_metadata(source: str, argument: str = "init_from") -> dict[str, Any]:
    """The keys of a configuration that weights know: backbone, backbone_args, channels, mean, std,
    pixel_range where there is one, and the global_size and eval_crop at which they were evaluated. Of timm's
    weights all but the last, of a file that is not ours none.

    Raises:
        ValueError: there is no such source, or it cannot be read; see `load_weights`.
    """
    file = weights_file(source, argument)
    if file is None:
        try:
            pretrained: Any = timm.get_pretrained_cfg(source)
        except RuntimeError as error:  # it has the model, but no such weights
            raise ValueError(f"{argument}: {error}") from error
        return {
            "backbone": source,
            "backbone_args": {},
            "channels": 3,
            "global_size": pretrained.input_size[-1],
            "mean": list(pretrained.mean),
            "std": list(pretrained.std),
        }
    try:
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            text, pixels = metadata.get("create_model"), metadata.get("pixels", "{}")
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, argument, error) from error
    if text is None:
        return {}
    try:
        return keys_of(json.loads(text)) | pixel_keys_of(json.loads(pixels))
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{argument}: the metadata of {file} is not what bincomm writes: "
            f"{error if isinstance(error, ValueError) else repr(error)}"
        ) from error


def keys_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The keys of a configuration in the metadata that bincomm writes, which may be someone else's: names and
    plain numbers only.

    Raises:
        LookupError, TypeError, ValueError: it is something else.
    """
    arguments = dict(arguments)
    for key in ("num_classes", "img_size", "dynamic_img_size"):
        arguments.pop(key, None)
    overlay = dict(arguments.pop("pretrained_cfg_overlay", {}))
    name, channels = arguments.pop("model_name"), arguments.pop("in_chans", 3)
    check_backbone_name(name, "backbone")
    check_backbone_arguments(arguments)
    keys: dict[str, Any] = {"backbone": name, "backbone_args": arguments, "channels": int(channels)}
    for key in ("mean", "std"):
        if key in overlay:
            keys[key] = [float(number) for number in overlay[key]]
            if len(keys[key]) != channels:
                raise ValueError(f"{key} has {len(keys[key])} numbers for {channels} channels")
    if "input_size" in overlay:
        keys |= {"global_size": int(overlay["input_size"][-1]), "eval_crop": float(overlay["crop_pct"])}
    return keys


def pixel_keys_of(pixels: dict[str, Any]) -> dict[str, Any]:
    """The keys of a configuration in what the metadata say of pixels, beside what timm has a word for.

    Raises:
        LookupError, TypeError, ValueError: it is something else.
    """
    if not pixels:
        return {}
    low, high = map(float, pixels["pixel_range"])
    return {"pixel_range": [low, high]}
