"""The shape of a whole decoder, as a frozen value. Families build it from a checkpoint's config.json.

A value that no decoder can have is a ValueError. The shapes of a layer's two sublayers are in `attention.py` and
`mixtures.py` beside this file.
"""

from dataclasses import dataclass
from typing import Literal

from model.expert_range import ExpertRange
from model.shapes.attention import AttentionShape
from model.shapes.checks import one_of, reals, sizes
from model.shapes.encoder import Encoder
from model.shapes.feed_forward import FeedForward
from model.shapes.memory import Memory, StateMemory
from model.shapes.rope import Rope

Norm = Literal["layer", "rms"]
Positions = Literal["rotary", "learned", "relative", "sinusoidal"]


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """One transformer of pre-norm layers: a decoder, or with `encoder` an encoder and a decoder. Widths are in
    elements, `context` in tokens.

    `attention` and `feed_forward` are the shapes of each layer's two sublayers, in the order in which they run. Layers
    after an encoder have a third between them: attention of the decoder's first shape to what the encoder made.
    """

    vocabulary: int
    width: int
    context: int
    attention: tuple[AttentionShape, ...]
    feed_forward: tuple[FeedForward, ...]
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # added to the weights of RMS norms: 1 where they are stored around zero
    positions: Positions = "rotary"
    tied: bool = False
    head_bias: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # what each sublayer's output is multiplied by before it is added
    logit_scale: float = 1.0
    extrapolates: bool = False  # other counts than the trained one are allowed even where a router is not made for them
    encoder: Encoder | None = None
    repaired: tuple[int, ...] = ()  # counts whose repair helps, where the layers have its statistics

    def __post_init__(self) -> None:
        sizes(vocabulary=self.vocabulary, width=self.width, context=self.context, layers=len(self.feed_forward))
        reals(norm_eps=self.norm_eps, norm_offset=self.norm_offset, embed_scale=self.embed_scale)
        reals(residual_scale=self.residual_scale, logit_scale=self.logit_scale)
        if self.norm_eps < 0:
            raise ValueError(f"norm_eps must be at least 0, got {self.norm_eps!r:.40}")
        one_of("norm", self.norm, Norm)
        one_of("positions", self.positions, Positions)
        if len(self.attention) != len(self.feed_forward):
            raise ValueError(
                f"{len(self.attention)} attention layers do not fit {len(self.feed_forward)} feed-forward layers"
            )
        if len({(shape.adaptive, shape.own_fields) for shape in self.mixtures}) > 1:
            raise ValueError("either all mixtures have gates or experts that compute nothing, or none of them")
        if self.encoder is not None:
            self.encoder.check_ids(self.vocabulary)
            if self.encoder.layers >= len(self.attention):
                raise ValueError(f"an encoder of {self.encoder.layers} layers leaves none for the decoder")

    @property
    def mixtures(self) -> tuple[FeedForward, ...]:
        """The MoE layers, whose expert count a request may choose, in order."""
        return tuple(shape for shape in self.feed_forward if shape.num_experts > 0)

    @property
    def experts(self) -> ExpertRange:
        """The counts that every MoE layer can run."""
        shapes = self.mixtures
        if not shapes:
            return ExpertRange(0, 0, 0, 0)
        trained, most = shapes[0].trained, min(shape.maximum for shape in shapes)
        refusal = next((shape.rule_refusal for shape in shapes if shape.rule_refusal), "")
        least = 1
        if any(shape.fixed for shape in shapes) and not self.extrapolates:
            least = most = trained
            refusal = refusal or "this model's router is made for the trained count alone"
        return ExpertRange(
            len(shapes),
            trained,
            least,
            most,
            refusal,
            set_refusal=self.set_refusal,
            total=shapes[0].num_experts,
            repaired=self.repaired,
            own_fields=shapes[0].own_fields,
            adaptive=shapes[0].adaptive,
        )

    @property
    def set_refusal(self) -> str:
        """Why no set of experts can be kept alone; empty: one can."""
        shapes = self.mixtures
        if not shapes:
            return "it has no mixture-of-experts layers"
        if self.encoder is not None:
            return "an encoder reads its texts, which predicts no tokens"
        if refusal := next((shape.set_refusal for shape in shapes if shape.set_refusal), ""):
            return refusal
        if len({shape.num_experts for shape in shapes}) > 1:
            return "its layers have different numbers of experts"
        return ""

    @property
    def draws_noise(self) -> bool:
        """Whether a request's noise seed changes the hidden states, and so belongs to the prefix cache's key."""
        return any(shape.draws_noise for shape in self.feed_forward)

    @property
    def ropes(self) -> frozenset[Rope]:
        """Every kind of rotary positions that a layer uses."""
        return frozenset(shape.rope for shape in self.attention if shape.rope is not None)

    @property
    def memory(self) -> tuple[Memory, ...]:
        """What is kept of a sequence: each layer's attention, then the feed-forward layers that keep something.

        With an encoder: the decoder layers' attention, their keys and values of the prompt, and its length.
        """
        kept = tuple(shape.memory for shape in self.feed_forward if shape.memory is not None)
        if self.encoder is None:
            return (*(shape.memory for shape in self.attention), *kept)
        attention = tuple(shape.memory for shape in self.attention[self.encoder.layers :])
        return (*attention, *attention, StateMemory(1), *kept)

    @property
    def token_local(self) -> bool:
        """Whether no mixture looks at other tokens than its own; attention always does."""
        return all(shape.token_local for shape in self.feed_forward)

    @property
    def chunkable(self) -> bool:
        """Whether a prompt can be computed in chunks: what a layer needs of earlier tokens is kept. An encoder's tokens
        see later ones."""
        return self.encoder is None and all(
            shape.token_local or shape.memory is not None for shape in self.feed_forward
        )

    @property
    def uneven(self) -> bool:
        """Whether tokens may run other pairs than their counts say whatever their rule: each stack of an encoder and a
        decoder has layers of its own, and tokens that compete for an expert may be dropped."""
        return not self.chunkable

    @property
    def score_refusal(self) -> str:
        """Why the tokens of a text have no probabilities, each after those before it alone; empty: they have."""
        if self.encoder is not None:
            return "an encoder reads them, which predicts no tokens"
        if not self.chunkable:
            return "it computes them as a whole, in which later tokens change what is predicted before them"
        return ""

    @property
    def has_states(self) -> bool:
        """Whether a layer keeps a state, which moves on with its sequence and cannot be set back."""
        return any(not memory.per_token for memory in self.memory)

    @property
    def rewinds(self) -> bool:
        """Whether a sequence can go on from any of its earlier positions: what it made after that is written over."""
        return self.chunkable and not self.has_states

    @property
    def prefix_reusable(self) -> bool:
        """Whether what is kept of a prefix can serve another sequence with the same prefix: where attention keeps
        states, at the positions of snapshots. Of a mixture's states none are taken."""
        return self.chunkable and all(shape.memory is None for shape in self.feed_forward)
