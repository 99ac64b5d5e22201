"""Self-supervised visual pretraining as discrete communication, and its fused operations.

Importing bincomm imports torch and nothing heavier: what trains, measures and encodes is imported once it is
used. `bincomm doctor` tells what is built, found and used.
"""

from typing import TYPE_CHECKING, Any

from bincomm.diagnosis import doctor
from bincomm.objectives import DINO, DiscreteCommunication, SimDINO
from bincomm.ops.coding_rate import coding_rate
from bincomm.ops.hamming import hamming_distance, hamming_topk
from bincomm.ops.messages import pack_signs, unpack_signs
from bincomm.ops.sign_bce import sign_bce

if TYPE_CHECKING:
    from bincomm.api import adapt, compare, encode, evaluate, load_pretrained, pretrain

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


def __getattr__(name: str) -> Any:
    if name in __all__:  # and not imported above
        from bincomm import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
