"""The shape of the encoder before a decoder: which layers it has, and how a prompt and an answer meet.

A frozen value that families build from a checkpoint's config.json; what no model can have is a ValueError.
"""

from dataclasses import dataclass

from model.shapes.checks import naturals, sizes


@dataclass(frozen=True, slots=True)
class RelativeBias:
    """T5's relative position bias (arXiv 1910.10683 §2.1): a learned value per head for each bucket of distances.

    Half of the buckets are for one distance each, the others grow towards `distance`, from which on all are one.
    """

    buckets: int
    distance: int
    shared: bool = True  # one table for all layers of a stack, or one for each

    def __post_init__(self) -> None:
        sizes(relative_attention_num_buckets=self.buckets, relative_attention_max_distance=self.distance)
        if self.buckets < 4 or self.distance <= self.buckets // 2:
            raise ValueError(
                f"relative_attention_num_buckets must be at least 4, and half of them fewer than"
                f" relative_attention_max_distance {self.distance}, got {self.buckets}"
            )


@dataclass(frozen=True, slots=True)
class Encoder:
    """The first `layers` of a decoder's layers are an encoder: they run for a prompt, whose tokens all see each other.

    The layers after them run for the answer, which begins with the token `start`, and look at what the encoder made of
    the prompt. A prompt is read up to its last token of `ends`; tokens after that one begin the answer. A prompt
    without any is read whole.
    """

    layers: int
    start: int  # decoder_start_token_id
    ends: tuple[int, ...] = ()
    forced: int | None = None  # the first token of an answer that the prompt does not begin
    bias: RelativeBias | None = None

    def __post_init__(self) -> None:
        sizes(encoder_layers=self.layers)
        for name, token in (("decoder_start_token_id", self.start), ("forced_bos_token_id", self.forced or 0)):
            naturals(**{name: token})

    def check_ids(self, vocabulary: int) -> None:
        """Raise ValueError where a token of this shape has no embedding."""
        for name, token in (("decoder_start_token_id", self.start), ("forced_bos_token_id", self.forced)):
            if token is not None and token >= vocabulary:
                raise ValueError(f"{name} {token} is not below vocab_size {vocabulary}")
