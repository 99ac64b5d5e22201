"""Triton kernels and their launchers, a file an operation; in a checkout their files lie in its folder `kernels`.

An installed wheel holds those files here, in place of this one.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "kernels")]
