"""Triton kernels and their launchers, one file per operation, in the folder `kernels` of the checkout.

In an installed wheel that folder replaces this file.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "kernels")]
