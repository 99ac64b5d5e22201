"""What a run's backbone and codes are worth at its end, and what a finished run prints."""

import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

from bincomm import __version__
from bincomm.building import create_networks, trained_part
from bincomm.config import PretrainConfig
from bincomm.data.sources import Source
from bincomm.evaluation.evaluate import NoUsableImagesError, evaluate, figure
from bincomm.evaluation.pretrained import Pretrained
from bincomm.files import read_json_lines
from bincomm.networks import Network
from bincomm.ops.coding_rate import rate_bounds

REPORT_FILE = "report.html"  # see `bincomm.evaluation.report`


def evaluate_run(
    network: Network,
    sources: tuple[Source, Source, bool] | None,
    config: PretrainConfig,
    run: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Evaluate the network that a run ends with, beside the same network before training and raw pixels.

    Args:
        network: backbone and head.
        sources: gallery, queries, and whether the queries were held out from training; None: no labels.
        config: of the run.
        run: its directory.
        device: of the network.

    Returns:
        What result.json holds: "last_metrics", "rate_ceiling" (nats), "versions", "machine", and
        "evaluation": {"teacher", "before_training", "pixels", "queries_held_out"}, the first three as
        `evaluate` returns them but for the seconds; None where there are no usable images with labels. With a
        frozen teacher "student" is in the place of "teacher"; see `trained_figures`.
    """
    metrics = read_json_lines(run / "metrics.jsonl")
    return {
        "last_metrics": metrics[-1] if metrics else {},
        "rate_ceiling": rate_bounds(config.batch_size, config.bits, config.eps_squared)[1],
        "versions": {"bincomm": __version__, "torch": torch.__version__, "timm": timm.__version__},
        "machine": {"device": device.type, "python": platform.python_version()},
        "evaluation": None if sources is None else _evaluate(network, sources, config, device),
    }


def evaluate_reproducibly(
    model: Pretrained,
    gallery: Source,
    queries: Source,
    protocols: Sequence[str],
    report_unusable: Sequence[str] = (),
) -> dict[str, Any]:
    """`evaluate` as runs, comparisons and adaptations keep its result: alike for equal networks, so without
    the seconds; and without the cache, for no other weights will ever be the same."""
    result = evaluate(model, gallery, queries, protocols, cache=False, report_unusable=report_unusable)
    del result["seconds"]
    return result


def _evaluate(
    network: Network, sources: tuple[Source, Source, bool], config: PretrainConfig, device: torch.device
) -> dict[str, Any] | None:
    gallery, queries, held_out = sources
    try:
        trained = evaluate_reproducibly(
            Pretrained.of(network, config, device),
            gallery,
            queries,
            ("knn", "knn_codes", "bits"),
            # Unusable images among those of pretraining were reported when they were trained on.
            report_unusable=("queries",) if held_out else (),
        )
    except NoUsableImagesError:
        return None
    _, untrained = create_networks(replace(config, fsdp=False), device)
    return {
        trained_part(config): trained,
        "before_training": evaluate_reproducibly(
            Pretrained.of(untrained, config, device), gallery, queries, ("knn",)
        ),
        "pixels": evaluate_reproducibly(Pretrained.of_pixels(config, device), gallery, queries, ("knn",)),
        "queries_held_out": held_out,
    }


def trained_figures(evaluation: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Of what result.json holds under "evaluation", the trained network: whether it is the "teacher" or, with
    a frozen teacher, the "student", and its figures."""
    name = "student" if "student" in evaluation else "teacher"
    return name, evaluation[name]


def accuracies(result: dict[str, Any]) -> list[tuple[str, float]]:
    """k-NN accuracies, k = 20, with their names, from what result.json holds; none without an evaluation."""
    evaluation = result["evaluation"]
    if not evaluation:
        return []
    trained, _ = trained_figures(evaluation)
    parts = (
        (f"{trained}'s backbone", trained, "knn"),
        ("its codes, Hamming", trained, "knn_codes"),
        ("before training", "before_training", "knn"),
        ("raw pixels", "pixels", "knn"),
    )
    return [(name, figure(evaluation[part], protocol, "20")) for name, part, protocol in parts]


def summary(result: dict[str, Any], output: str) -> str:
    """What a finished run prints, from what its result.json holds and its directory."""
    metrics, evaluation, lines = result["last_metrics"], result["evaluation"], []
    if evaluation:
        _, figures = trained_figures(evaluation)
        sizes = f"{figures['query_images']} queries in {figures['gallery_images']} images"
        lines.append(f"\nk-NN accuracy, k=20, {sizes}")
        lines += [f"  {name:20} {share:7.2%}" for name, share in accuracies(result)]
        if not evaluation["queries_held_out"]:
            lines.append("  (the queries' images, not their labels, were used in training)")
    else:
        reason = result.get("no_evaluation", "no image with a label can be used")
        lines.append(f"\nno k-NN: {reason}")
    if "bit_entropy" in metrics:
        entropy, least = metrics["bit_entropy"], metrics["bit_entropy_min"]
        gain = metrics["bit_accuracy"] - metrics["bit_majority"]
        lines.append(
            f"channel: bit entropy {entropy:.3f} (least {least:.3f}), {metrics['dead_bits']:.1%} dead bits,"
        )
        if "transmitted_bits" in metrics:
            lines.append(f"  {metrics['transmitted_bits']:.1f} bits of a message transmitted,")
        lines.append(
            f"  {metrics['bit_accuracy']:.1%} of bits predicted right, {100 * gain:+.1f} points over always "
            "guessing the more frequent value"
        )
    lines.append(
        f"in {output}: model.safetensors, config.json, README.md, curves.png, metrics.jsonl, result.json, "
        "config.yaml, checkpoints"
    )
    report = Path(output) / REPORT_FILE
    if report.exists():
        lines.append(f"whether it works, and what to try next: {report}")
    return "\n".join(lines)
