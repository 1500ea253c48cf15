"""Gated delta rule behind a short causal convolution (Qwen3-Next; Gated DeltaNet, arXiv 2412.06464 eq. 10).

Per value head a state S [K, V], float32: S ← e^g · S; S ← S + k ⊗ β(v - Sᵀk); y = Sᵀq. The state and the last inputs of
the convolution are all that is kept of a sequence. Computed token by token, so that chunks change nothing.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.layers import RMSNorm
from model.registry import LayerModule, module_for
from model.shapes.attention import GatedDeltaNet
from model.shapes.decoder import DecoderConfig
from model.step import LayerStep


class GatedDeltaNetAttention(LayerModule):
    """`project` gives, by key head, query, key, values and output gates; `rates` gives, by key head, β and decay
    logits."""

    def __init__(self, shape: GatedDeltaNet, config: DecoderConfig) -> None:
        super().__init__()
        self.shape = shape
        values = shape.value_heads * shape.value_width
        self.project = nn.Linear(config.width, shape.channels + values, bias=False)
        self.rates = nn.Linear(config.width, 2 * shape.value_heads, bias=False)
        self.convolution = nn.Parameter(torch.empty(shape.channels, 1, shape.kernel))
        self.step_bias = nn.Parameter(torch.empty(shape.value_heads))
        self.log_decay = nn.Parameter(torch.empty(shape.value_heads))
        self.norm = RMSNorm(shape.value_width, config.norm_eps)
        self.out = nn.Linear(values, config.width, bias=False)

    def forward(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        s = self.shape
        mixed_TC, gate_THV = self._split(self.project(x_TD))
        beta_TH, decay_TH = self._rates(self.rates(x_TD))
        y_THV = torch.empty(len(x_TD), s.value_heads, s.value_width, device=x_TD.device)
        for rows, state, fresh in step.states(s.memory.size):
            inputs = s.channels * (s.kernel - 1)
            past, memory = state[:inputs], state[inputs:]
            past_CK = past.view(s.channels, -1)
            memory_HKV = memory.view(s.value_heads, s.key_width, s.value_width)
            if fresh:
                state.zero_()
            convolved_TC = self._convolve(mixed_TC[rows], past_CK)
            y_THV[rows] = self._recur(convolved_TC, beta_TH[rows], decay_TH[rows], memory_HKV)
        gated_THV = self.norm(y_THV) * F.silu(gate_THV.float())
        return self.out(gated_THV.to(x_TD.dtype).flatten(1))

    def _split(self, all_TX: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, keys and values side by side [T, C], and the output gates [T, H, V]."""
        s = self.shape
        per = s.value_heads // s.key_heads * s.value_width
        widths = (s.key_width, s.key_width, per, per)
        parts = all_TX.unflatten(-1, (s.key_heads, -1)).split(widths, dim=-1)
        mixed_TC = torch.cat([part.flatten(1) for part in parts[:3]], dim=-1)
        return mixed_TC, parts[3].reshape(len(all_TX), s.value_heads, s.value_width)

    def _rates(self, both_TX: Tensor) -> tuple[Tensor, Tensor]:
        """β and e^g of each value head, float32 [T, H]."""
        by_head = both_TX.unflatten(-1, (self.shape.key_heads, -1))
        beta, step = by_head.chunk(2, dim=-1)
        grown = F.softplus(step.flatten(1).float() + self.step_bias.float())
        decay_TH = (-self.log_decay.float().exp() * grown).exp()
        return beta.flatten(1).float().sigmoid(), decay_TH

    def _convolve(self, mixed_RC: Tensor, past_CK: Tensor) -> Tensor:
        """silu(causal depthwise convolution) [R, C]; the last inputs are left in `past_CK`."""
        inputs_CX = torch.cat([past_CK, mixed_RC.float().T], dim=-1)
        past_CK.copy_(inputs_CX[:, inputs_CX.shape[1] - past_CK.shape[1] :])
        out_CR = F.conv1d(inputs_CX[None], self.convolution.float(), groups=self.shape.channels)[0]
        return F.silu(out_CR).T

    def _recur(self, convolved_RC: Tensor, beta_RH: Tensor, decay_RH: Tensor, memory_HKV: Tensor) -> Tensor:
        """Outputs [R, H, V]; the state is left in `memory_HKV`."""
        s = self.shape
        keys, values = s.key_heads * s.key_width, s.value_heads * s.value_width
        q, k, v = convolved_RC.split((keys, keys, values), dim=-1)
        q_RHK = self._unit_heads(q) * s.key_width**-0.5
        k_RHK = self._unit_heads(k)
        v_RHV = v.unflatten(-1, (s.value_heads, -1))
        out = []
        for r in range(len(v_RHV)):
            memory_HKV *= decay_RH[r, :, None, None]
            known_HV = torch.einsum("hkv,hk->hv", memory_HKV, k_RHK[r])
            change_HV = beta_RH[r, :, None] * (v_RHV[r] - known_HV)
            memory_HKV += torch.einsum("hk,hv->hkv", k_RHK[r], change_HV)
            out.append(torch.einsum("hkv,hk->hv", memory_HKV, q_RHK[r]))
        return torch.stack(out)

    def _unit_heads(self, part_RX: Tensor) -> Tensor:
        """Queries or keys of length one, repeated for the value heads that share them."""
        heads_RGK = part_RX.unflatten(-1, (self.shape.key_heads, -1))
        return _unit(heads_RGK).repeat_interleave(self.shape.value_heads // self.shape.key_heads, dim=1)


@module_for.register
def _(shape: GatedDeltaNet, decoder: DecoderConfig) -> GatedDeltaNetAttention:
    return GatedDeltaNetAttention(shape, decoder)


def _unit(x: Tensor) -> Tensor:
    """x / |x|, as the reference rounds it."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
