"""Self-supervised visual pretraining as discrete communication, and its fused operations.

Importing bincomm imports torch and nothing heavier; `bincomm doctor` tells what is built, found and used.
"""

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
    "coding_rate",
    "doctor",
    "hamming_distance",
    "hamming_topk",
    "pack_signs",
    "sign_bce",
    "unpack_signs",
]
