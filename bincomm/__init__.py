"""Self-supervised visual pretraining as discrete communication, and its fused operations.

Importing bincomm imports nothing heavy, so that `bincomm --help` is quick: every name below is imported once
it is used, the operations with torch and no larger package. `bincomm doctor` tells what is built, found and
used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bincomm.api import adapt, compare, encode, evaluate, load_pretrained, pretrain
    from bincomm.diagnosis import doctor
    from bincomm.objectives import DINO, DiscreteCommunication, SimDINO
    from bincomm.ops.coding_rate import coding_rate
    from bincomm.ops.hamming import hamming_distance, hamming_topk
    from bincomm.ops.messages import pack_signs, unpack_signs
    from bincomm.ops.sign_bce import sign_bce

__version__ = "0.1.0"
__all__ = [
    "DINO",
    "DiscreteCommunication",
    "SimDINO",
    "adapt",
    "coding_rate",
    "compare",
    "doctor",
    "encode",
    "evaluate",
    "hamming_distance",
    "hamming_topk",
    "load_pretrained",
    "pack_signs",
    "pretrain",
    "sign_bce",
    "unpack_signs",
]


MODULES = {  # that have these names
    "api": ("adapt", "compare", "encode", "evaluate", "load_pretrained", "pretrain"),
    "diagnosis": ("doctor",),
    "objectives": ("DINO", "DiscreteCommunication", "SimDINO"),
    "ops.coding_rate": ("coding_rate",),
    "ops.hamming": ("hamming_distance", "hamming_topk"),
    "ops.messages": ("pack_signs", "unpack_signs"),
    "ops.sign_bce": ("sign_bce",),
}


def __getattr__(name: str) -> Any:
    for module, names in MODULES.items():
        if name in names:
            return getattr(import_module(f"bincomm.{module}"), name)
    if name in ("diagnosis", "objectives", "ops"):
        return import_module(f"bincomm.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
