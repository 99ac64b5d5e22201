"""Triton kernels and their launchers, a file an operation: they lie in the folder `kernels` of the checkout.

An installed wheel holds that folder here, in place of this file.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "kernels")]
