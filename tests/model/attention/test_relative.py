"""Buckets of relative positions are those of transformers' T5, and distances beyond the ends have the end's value."""

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from model.attention.relative import buckets, distance_bias
from model.shapes.encoder import Encoder, RelativeBias


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("count", "distance"), [(32, 128), (8, 12), (12, 20), (4, 3), (7, 9)])
def test_the_buckets_of_t5(count: int, distance: int, causal: bool) -> None:
    away = torch.arange(-300, 301)
    theirs = T5Attention._relative_position_bucket(-away, not causal, count, distance)
    assert torch.equal(buckets(away, RelativeBias(count, distance), causal), theirs)
    table_NH = torch.randn(count, 2)
    bias = distance_bias(table_NH, RelativeBias(count, distance), causal)
    assert torch.equal(bias.at(away[:, None], torch.zeros(1, dtype=torch.int64))[..., 0], table_NH[theirs].T)


def test_what_no_encoder_can_have_is_refused() -> None:
    with pytest.raises(ValueError, match="relative_attention_num_buckets must be at least 4"):
        RelativeBias(32, 16)
    with pytest.raises(ValueError, match="forced_bos_token_id 61 is not below vocab_size 61"):
        Encoder(2, 0, forced=61).check_ids(61)
    with pytest.raises(ValueError, match="decoder_start_token_id must be"):
        Encoder(2, -1)
