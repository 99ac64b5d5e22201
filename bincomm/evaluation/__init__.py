"""Evaluation of backbones and of the codes."""
