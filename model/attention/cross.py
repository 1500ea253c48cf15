"""Attention of a decoder's tokens to what an encoder made of the prompt.

Keys and values are computed when the prompt is, and then stay where the layer keeps them.
"""

from torch import Tensor, nn

from model.shapes.attention import Attention
from model.shapes.decoder import DecoderConfig
from model.step import LayerStep, MaskSpec


class CrossAttention(nn.Module):
    """Key and value are one matrix [2G·C, D]."""

    def __init__(self, shape: Attention, config: DecoderConfig) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        self.query = nn.Linear(config.width, queries, bias=shape.bias)
        self.kv = nn.Linear(config.width, 2 * keys, bias=shape.bias)
        self.out = nn.Linear(queries, config.width, bias=shape.out_bias)

    def forward(self, x_TD: Tensor, encoded_SD: Tensor, step: LayerStep) -> Tensor:
        """Of T rows of the decoder; `encoded_SD` are the encoder's rows of this step, of new prompts alone."""
        s = self.shape
        q_THC = self.query(x_TD).unflatten(-1, (s.heads, -1))
        k_SGC, v_SGC = self.kv(encoded_SD).unflatten(-1, (2 * s.kv_heads, -1)).chunk(2, dim=1)
        scale = s.head_width**-0.5 if s.scale is None else s.scale
        return self.out(step.attend(q_THC, k_SGC, v_SGC, MaskSpec(scale, causal=False)).flatten(1))
