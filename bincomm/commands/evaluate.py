"""Evaluate a pretrained backbone: on labeled images by k-NN, linear probes, retrieval by features and by
codes, dimensions and bits in use; on DAVIS by tracking objects; on COCO by discovering objects; on masks by
segmentation; on images with several labels by retrieval."""

import argparse
from typing import Any

from bincomm.commands.arguments import add_weights, integers, names, path_or_name, preprocessing
from bincomm.parsing import parse_data

# Written out, because importing bincomm.evaluation takes seconds; tests/test_cli.py compares them.
PROTOCOLS = "knn, linear, augmented, map, geometry, knn_codes, map_codes, map_at, lookup, bits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Weights, and what to evaluate them on."""
    add_weights(parser, head=False)
    parser.add_argument("--data", type=path_or_name, help="labeled images, as in `bincomm pretrain`")
    parser.add_argument(
        "--protocols",
        type=names,
        metavar="NAMES",
        help=f"protocols on --data, of {PROTOCOLS}; default: all that apply",
    )
    parser.add_argument(
        "--davis",
        type=path_or_name,
        metavar="FOLDER",
        help="folder of DAVIS-2017 or DAVIS-2016 that contains ImageSets",
    )
    parser.add_argument(
        "--objects",
        type=path_or_name,
        metavar="FOLDER",
        help="folder of COCO, or with annotations.json and images; or FILE@IMAGES",
    )
    parser.add_argument(
        "--segmentation",
        type=path_or_name,
        metavar="FOLDER",
        help="folder with train/images, train/masks, val/images and val/masks; or VOC, ADE20K or CamVid",
    )
    parser.add_argument(
        "--void",
        type=integers,
        metavar="N,...",
        help="classes of --segmentation that do not count; 255 and those of a published set never do",
    )
    parser.add_argument(
        "--masks",
        type=path_or_name,
        metavar="FOLDER",
        help="new folder for the predicted masks of --davis, --objects and --segmentation",
    )
    parser.add_argument(
        "--hashing",
        type=path_or_name,
        metavar="FOLDER",
        help="folder with database.txt and test.txt, images with several labels",
    )
    parser.add_argument(
        "--at", type=int, default=1000, metavar="K", help="nearest images that count in mAP@K (1000)"
    )
    parser.add_argument(
        "--unmatched",
        choices=("zero", "skip"),
        default="zero",
        help="queries to which no image is relevant count as 0 in mAP@K (default), or are left out",
    )
    parser.add_argument("--output", type=path_or_name, metavar="FILE", help="JSON file to write")


def run(options: argparse.Namespace) -> None:
    """Evaluate, and print each part as soon as it is ready."""
    from bincomm.api import evaluate
    from bincomm.evaluation.evaluate import describe

    def on_result(part: dict[str, Any]) -> None:
        print(describe(part), flush=True)

    evaluate(
        options.weights,
        parse_data(options.data) if options.data else None,
        protocols=options.protocols,
        davis=options.davis,
        objects=options.objects,
        segmentation=options.segmentation,
        void=options.void or (),
        masks=options.masks,
        hashing=options.hashing,
        at=options.at,
        unmatched=options.unmatched,
        device=options.device,
        backbone=options.backbone,
        output=options.output,
        on_result=on_result,
        **preprocessing(options),
    )
