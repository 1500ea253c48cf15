"""Kimi K2 (arXiv 2507.20534): DeepSeek-V3's layers with more experts, fewer heads and one group."""

from model.families.deepseek_v3 import decoder_config

__all__ = ["decoder_config"]
