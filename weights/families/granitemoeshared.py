"""Granite-MoE with a shared part: its tensors are named as Granite-MoE's, and nothing else is known here."""

from weights.families.granitemoe import rules

__all__ = ["rules"]
