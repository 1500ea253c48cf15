"""Which keys of a GGUF file's metadata may go unread: they do not change what a decoder computes. Torch-free.

The keys are without the architecture's name before them; they do not depend on the family.
"""

from weights.gguf.header import Value

HARMLESS = frozenset(
    {
        "vocab_size",  # the embedding has as many rows
        "pooling_type",  # what is made of hidden states where an embedding of the text is asked for
        "attention.layer_norm_epsilon",  # of norms that subtract the mean; llama.cpp's graphs read it for GPT-2 alone
        "rope.dimension_sections",  # which pairs turn by which axis of an image; text has one position on all axes
        "rope.scaling.finetuned",  # how the model was trained
        "rope.scaling.original_context_length",  # YaRN and LongRoPE read it, and nothing else depends on it
    }
)
UNSET: tuple[object, ...] = (False, 0, "")  # say no more than an absent key
NEUTRAL: dict[str, tuple[object, ...]] = {  # values that say no more than an absent key
    "attention.causal": (True,),
    "embedding_scale": (0, 1),  # here and below, 1 multiplies or divides by one, or is one group of all
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_scale": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.type": ("none", "linear"),  # of linear scaling, the factor is looked at
    "rope.scaling.yarn_ext_factor": (-1, 0),  # YaRN's share, and -1 where the kind of scaling decides
    "tensor_data_layout": ("Meta AI original pth",),  # rotary rows as neighbours, as the architecture has them
}


def harmless(key: str, value: Value) -> bool:
    """Whether an unread key says nothing of what the decoder computes; of a value per layer, every one."""
    if key in HARMLESS:
        return True
    neutral = NEUTRAL.get(key, UNSET)
    return all(each in neutral for each in value) if isinstance(value, list) else value in neutral
