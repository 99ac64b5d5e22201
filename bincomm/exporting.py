"""A pretrained backbone as an ONNX file, which runs without PyTorch and without bincomm."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bincomm.evaluation.pretrained import Pretrained
from bincomm.files import write_file
from bincomm.networks import Head, PrototypeHead

LARGEST = 2**31 - 2**24  # bytes of weights: an ONNX file has less than 2 GiB, its graph included
TOLERANCE = 1e-4  # as a share of the largest feature, or logit
CHECKED_BATCHES = (1, 3)  # neither is as large as the batch that is traced


class Exported(NamedTuple):
    """What `export_onnx` has written."""

    channels: int  # C
    size: int  # S, side of the images in pixels
    features: int  # D
    bits: int | None  # K; None without codes
    difference: float  # the largest between ONNX Runtime and PyTorch, as a share of the largest feature


class WithBits(nn.Module):
    """Backbone and head: images (n, C, S, S) -> features (n, D) and bits (n, K) bool."""

    def __init__(self, backbone: nn.Module, head: Head | PrototypeHead):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(images)
        return features, self.head.code(features) > 0


def export_onnx(model: Pretrained, path: Path, *, codes: bool = False) -> Exported:
    """Write a backbone as an ONNX file, after ONNX Runtime has computed with it what PyTorch computes.

    The input "images" is (n, C, S, S) fp32, normalized, for any n; S is `model.config.global_size`. The
    output "features" is (n, D) fp32; with `codes` there is "bits", (n, K) bool. The metadata of the file hold
    what images are preprocessed with, as config.json of a run has it: "input_size", "crop_pct", "mean", "std"
    and "interpolation", and "pixel_range" where there is one.

    Args:
        model: the backbone, and its head for codes; on the CPU.
        path: the file. Weights are in it, not beside it.
        codes: whether the code is an output, too.

    Raises:
        ValueError: there is no head for codes, the weights need 2 GiB or more, the network cannot be
            converted, or what was written computes something else.
        ImportError: onnx, onnxscript or onnxruntime is missing.
        OSError: the file cannot be written.
    """
    import onnx
    import onnxruntime  # noqa: F401  (here as well, because what is missing is told before the work)
    import onnxscript  # noqa: F401

    network = model.backbone
    if codes:
        if model.head is None:
            raise ValueError(f"codes: expected a run's directory or a checkpoint, got {model.name}: no head")
        network = WithBits(model.backbone, model.head).eval()
    size = sum(value.nbytes for value in network.state_dict().values())
    if size > LARGEST:
        raise ValueError(
            f"onnx: expected weights of less than 2 GiB, as one ONNX file holds, got {size / 2**30:.1f} GiB"
        )
    config = model.config
    shape = [config.channels, config.global_size, config.global_size]
    proto = convert(network, shape, ["features", "bits"][: 1 + codes])
    pixels = {} if config.pixel_range is None else {"pixel_range": json.dumps(config.pixel_range)}
    onnx.helper.set_model_props(
        proto,
        {
            "input_size": json.dumps(shape),
            "crop_pct": json.dumps(config.eval_crop),
            "mean": json.dumps(config.mean),
            "std": json.dumps(config.std),
            "interpolation": "bicubic",
            **pixels,
        },
    )
    data = proto.SerializeToString(deterministic=True)
    exported = check(data, model, codes)
    write_file(path, lambda file: file.write(data))
    return exported


def convert(network: nn.Module, shape: list[int], outputs: list[str]):
    """A network as an `onnx.ModelProto`, for any number of images of a shape (C, S, S)."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    try:
        program = torch.onnx.export(
            network,
            (torch.zeros(2, *shape),),
            dynamo=True,
            input_names=["images"],
            output_names=outputs,
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(f"onnx: {type(network).__name__} cannot be converted: {reason}") from error
    assert program is not None
    # The exporter notes the lines of code of every operation, with paths of this machine.
    ClearMetadataAndDocStringPass()(program.model)
    return program.model_proto


@torch.no_grad()
def check(data: bytes, model: Pretrained, codes: bool) -> Exported:
    """Compare ONNX Runtime with PyTorch on random images, in batches of several sizes.

    Raises:
        ValueError: it cannot run the file, a feature differs by more than `TOLERANCE`, or a bit differs whose
            logit is not as near to 0.
    """
    import onnxruntime

    generator, config = torch.Generator().manual_seed(0), model.config
    difference, width, bits = 0.0, 0, None
    for batch in CHECKED_BATCHES:
        images = torch.randn(
            batch, config.channels, config.global_size, config.global_size, generator=generator
        )
        expected = model.backbone(images)
        try:
            session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
            features, *others = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
        except Exception as error:  # its classes have no other in common
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"onnx: ONNX Runtime cannot run it, so it was not written: {reason}") from error
        share = ((features - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
        if not share <= TOLERANCE:  # NaN is not, either
            raise ValueError(
                f"onnx: features of ONNX Runtime and PyTorch differ by {share:.1g} of the largest, expected "
                f"at most {TOLERANCE}; the file was not written"
            )
        difference, width = max(difference, share), expected.shape[1]
        if codes and model.head is not None:
            logits = model.head.code(expected)
            clear = logits.abs() > TOLERANCE * logits.abs().max()
            wrong = int(((logits > 0) != others[0])[clear].sum())
            if wrong:
                raise ValueError(
                    f"onnx: {wrong} of {logits.numel()} bits of ONNX Runtime and PyTorch differ; the file "
                    "was not written"
                )
            bits = logits.shape[1]
    return Exported(config.channels, config.global_size, width, bits, difference)
