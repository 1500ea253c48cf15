"""The simplest quantisers to three types, and float32: enough to make small files."""

import torch
from torch import Tensor

from tests.weights.gguf.writer import Blob, blob

GROUP = 32


def floats(name: str, tensor: Tensor) -> Blob:
    """As float32."""
    return blob("F32", tuple(tensor.shape), tensor.contiguous().numpy().tobytes())


def mixed(name: str, tensor: Tensor) -> Blob:
    """Vectors, the router and odd widths as float32; matrices by their part, gates otherwise than values."""
    plain = not name.endswith("weight") or "ffn_gate_inp" in name or "norm" in name
    if plain or tensor.dim() < 2 or tensor.shape[-1] % GROUP:
        return floats(name, tensor)
    if any(part in name for part in ("gate", "attn_q.", "attn_k_b")):
        return _q4_0(tensor)
    return _q4_1(tensor) if any(part in name for part in ("up", "attn_k.")) else _q8_0(tensor)


def _q8_0(tensor: Tensor) -> Blob:
    groups = tensor.reshape(-1, GROUP)
    scales = (groups.abs().amax(-1, keepdim=True) / 127).half()
    codes = (groups / scales.float()).round().clamp(-127, 127).to(torch.int8)
    return _blob("Q8_0", tensor, scales, codes)


def _q4_0(tensor: Tensor) -> Blob:
    groups = tensor.reshape(-1, GROUP)
    scales = (groups.abs().amax(-1, keepdim=True) / 7).half()
    codes = (groups / scales.float()).round().clamp(-7, 7) + 8
    return _blob("Q4_0", tensor, scales, _halves(codes))


def _q4_1(tensor: Tensor) -> Blob:
    groups = tensor.reshape(-1, GROUP)
    least, most = (bound[:, None] for bound in torch.aminmax(groups, dim=-1))
    scales, minima = ((most - least) / 15).half(), least.half()
    codes = ((groups - minima.float()) / scales.float()).round().clamp(0, 15)
    return _blob("Q4_1", tensor, scales, minima, _halves(codes))


def _halves(codes: Tensor) -> Tensor:
    """The first half of a group in the low bits, the second in the high ones."""
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


def _blob(kind: str, tensor: Tensor, *parts: Tensor) -> Blob:
    data = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)
    return blob(kind, tuple(tensor.shape), data.numpy().tobytes())
