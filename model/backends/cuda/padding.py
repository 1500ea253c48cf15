"""Padding: a step on the host, made as large as its bucket.

A token of padding has no experts, no slot in the cache, no tile of queries and the family's rule; a sequence of padding
has no tokens, so that no state is touched; a row of padding asks for the logits of the last token, whatever it is. What
is computed of them is not read.
"""

from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from model.backends.cuda.inputs import StepInputs, StepShape, changed
from model.backends.cuda.kernels.attend import QueryTiles

NO_SLOT = NO_SEQUENCE = -1


def padded(inputs: StepInputs, shape: StepShape) -> StepInputs:
    """The same step with padding up to `shape`, a bucket of its own (`Buckets.of`)."""
    tokens, more_sequences = shape.tokens, shape.sequences - inputs.shape.sequences
    tables_BP = F.pad(inputs.tables_BP, (0, shape.blocks - inputs.shape.blocks))
    return replace(
        inputs,
        shape=shape,
        ids_T=_longer(inputs.ids_T, tokens),
        positions_T=_longer(inputs.positions_T, tokens),
        seeds_T=_longer(inputs.seeds_T, tokens),
        counts_LT=F.pad(inputs.counts_LT, (0, tokens - inputs.shape.tokens)),
        rows_B=_longer(inputs.rows_B, shape.rows, tokens - 1),
        tables_BP=F.pad(tables_BP, (0, 0, 0, more_sequences)),
        spans_B3=F.pad(inputs.spans_B3, (0, 0, 0, more_sequences)),
        slots_T=_longer(inputs.slots_T, tokens, NO_SLOT),
        tiles=QueryTiles(
            _longer(inputs.tiles.sequence_N, shape.tiles, NO_SEQUENCE),
            _longer(inputs.tiles.first_N, shape.tiles),
            shape.tile_rows,
        ),
        states_B=None if inputs.states_B is None else _longer(inputs.states_B, shape.sequences),
        rules=changed(inputs.rules, lambda x_T: _longer(x_T, tokens)),  # the family's
    )


def _longer(x_N: Tensor, length: int, value: int = 0) -> Tensor:
    return F.pad(x_N, (0, length - len(x_N)), value=value)
