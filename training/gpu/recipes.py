"""The twins that ship: shapes and plans for `training.on_gpu`. Both do K / 32 of the wide layer's work at count K."""

from training.gpu.network import Shape
from training.gpu.plan import Plan

INFINITY = Shape(kind="infinity", blocks=96, block=64, kept=3, draws="points", replacement=False, aggregate="norm")
TOPK = Shape(kind="topk", blocks=32, block=128)
INFINITY_PLAN = Plan(rows=48, muon_lr=0.03, adam_lr=3e-3, route_lr=1e-3, by_block=False, warmup=100)
TOPK_PLAN = Plan(rows=48, muon_lr=0.02, adam_lr=3e-3, route_lr=2e-3, by_block=True, warmup=100)
TWINS = {"infinity": (INFINITY, INFINITY_PLAN), "topk": (TOPK, TOPK_PLAN)}
