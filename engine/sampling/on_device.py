"""The sampler for logits on a device: tokens are chosen there, and the host reads them when it needs them.

While the model computes a step, the host prepares what the step's rows ask for and copies it to the device: no logits
come back, and nothing is waited for before the results are. A row's results are those of `sampler.py`.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import Sampled
from engine.sampling.constraints import Faults, row_masks
from engine.sampling.device_logprobs import as_logprobs, scores
from engine.sampling.penalties import Ints, allowed_words, edits, forbidden_tokens
from engine.sampling.sampler import NO_TOKEN_ALLOWED, failed, measured_rows, row_parameters
from engine.sampling.uncertainty import uncertainty
from engine.sampling.upload import upload
from engine.sequence import Sequence
from engine.types import Logprob, Measure
from model.backends.base import DeviceSamplingOps
from model.devices import Fetched
from model.sampling import MIN_TEMPERATURE, Chosen, Draws, Edits, Masks, SamplingInputs

WORD = 32  # tokens per word of a packed mask
Arrays = list[NDArray[np.generic]]


class Restriction(NamedTuple):
    """What the settings of a row exclude."""

    forbids: Callable[[int], bool]
    has_grammar: bool  # which takes precedence over what only edits exclude


class LaunchedSamples:
    """What a step samples, not waited for. `token_R`: the token of each row on the device, int64; 0 where the logits
    are not finite, and some id where there is no token for another reason."""

    def __init__(
        self,
        chosen: Chosen,
        faults: Faults,
        restrictions: dict[int, Restriction],
        scored: "_ScoredRows | None",
        measured: "_MeasuredRows",
    ) -> None:
        self.token_R = chosen.token_R
        self._faults, self._restrictions, self._scored, self._measured = faults, restrictions, scored, measured
        excluded_R = torch.zeros_like(chosen.finite_R) if chosen.excluded_R is None else chosen.excluded_R
        self._fetched = Fetched(
            [chosen.token_R, chosen.finite_R, excluded_R, *measured.tensors, *(scored.tensors if scored else ())]
        )

    def results(self) -> tuple[Sampled, ...]:
        """One for each row, in order. Waits for the device."""
        token_R, finite_R, excluded_R, *others = self._fetched.wait()
        measures = len(self._measured.tensors)
        measured = self._measured.values(others[:measures])
        logprobs = self._scored.logprobs(others[measures:]) if self._scored else {}
        found: list[Sampled] = []
        rows = zip(token_R.tolist(), finite_R.tolist(), excluded_R.tolist(), strict=True)
        for row, (token, finite, excluded) in enumerate(rows):
            fault = self._faults.get(row)
            if fault is None and finite and self._forbids(row, token, excluded):
                fault = NO_TOKEN_ALLOWED
            if finite and fault is None:
                found.append(Sampled(token, logprobs.get(row), measured=measured.get(row)))
            else:
                found.append(failed(fault))
        return tuple(found)

    def _forbids(self, row: int, token: int, excluded: bool) -> bool:
        restriction = self._restrictions.get(row)
        if restriction is None:
            return False
        return restriction.forbids(token) or (excluded and not restriction.has_grammar)


class _ScoredRows:
    """The rows of a step that want log-probabilities, with their scores on the device."""

    def __init__(self, logits_RV: Tensor, token_R: Tensor, wanted: dict[int, int]) -> None:
        self._wanted = wanted
        if len(wanted) < len(logits_RV):
            (rows_L,) = upload([np.array(list(wanted))], logits_RV.device)
            logits_RV, token_R = logits_RV.index_select(0, rows_L), token_R.index_select(0, rows_L)
        self.tensors = scores(logits_RV, token_R, max(wanted.values()))

    def logprobs(self, fetched: list[Tensor]) -> dict[int, Logprob | None]:
        """Of each row that wants them, from the scores on the host."""
        wanted = self._wanted
        return dict(zip(wanted, as_logprobs(fetched, list(wanted.values())), strict=True))


class _MeasuredRows:
    """The rows of a step that want to know how unsure the model is, with the measures on the device."""

    def __init__(self, logits_RV: Tensor, rows: dict[Measure, list[int]]) -> None:
        self._rows = list(rows.values())
        self.tensors = [uncertainty(_rows_of(logits_RV, chosen), by) for by, chosen in rows.items()]

    def values(self, fetched: list[Tensor]) -> dict[int, float]:
        """By row, from the measures on the host."""
        columns = zip(self._rows, fetched, strict=True)
        return {row: value for rows, values in columns for row, value in zip(rows, values.tolist(), strict=True)}


def _rows_of(logits_RV: Tensor, rows: list[int]) -> Tensor:
    """These rows; without a copy where they are all."""
    if len(rows) == len(logits_RV):
        return logits_RV
    (rows_L,) = upload([np.array(rows)], logits_RV.device)
    return logits_RV.index_select(0, rows_L)


def launch_samples(ops: DeviceSamplingOps, logits_RV: Tensor, sequences: list[Sequence]) -> LaunchedSamples:
    """Sample the next token of each sequence, one row each; the logits are not changed and nothing is waited for."""
    vocabulary = logits_RV.shape[1]
    inputs, faults = _inputs(sequences, vocabulary, logits_RV.device)
    chosen = ops.choose(logits_RV, inputs)
    restrictions = {
        row: Restriction(forbidden_tokens(sequence, vocabulary), sequence.matcher is not None)
        for row, sequence in enumerate(sequences)
        if sequence.request.sampling.restricts
    }
    logprobs_R = [sequence.request.sampling.logprobs for sequence in sequences]
    wanted = {row: count for row, count in enumerate(logprobs_R) if count is not None}
    scored = _ScoredRows(logits_RV, chosen.token_R, wanted) if wanted else None
    measured = _MeasuredRows(logits_RV, measured_rows(sequences))
    return LaunchedSamples(chosen, faults, restrictions, scored, measured)


def _inputs(sequences: list[Sequence], vocabulary: int, device: torch.device) -> tuple[SamplingInputs, Faults]:
    """What the rows ask for, on its way to the device, and the rows that cannot be sampled from."""
    if all(sequence.plain_greedy for sequence in sequences):
        return SamplingInputs(), {}
    began = time.perf_counter()
    grammar = row_masks(sequences, None)
    grammar_masks = _masks(grammar.masks, grammar.mask_of_B, vocabulary)
    grammar.record_seconds(time.perf_counter() - began)
    edited = edits(sequences, vocabulary)
    cuts, draws = _draws(sequences, vocabulary)
    groups: list[Arrays] = [list(edited or ()), _allowed(sequences, vocabulary), grammar_masks, draws]
    tensors = iter(upload([array for group in groups for array in group], device))
    edit_tensors, allowed, masks, draw_tensors = ([next(tensors) for _ in group] for group in groups)
    inputs = SamplingInputs(
        edits=Edits(*edit_tensors) if edit_tensors else None,
        allowed=Masks(*allowed) if allowed else None,
        grammar=Masks(*masks) if masks else None,
        draws=Draws(*draw_tensors, cuts=cuts) if draw_tensors else None,
    )
    return inputs, grammar.faults


def _masks(masks: list[NDArray[np.int32]], mask_of_R: Ints, vocabulary: int) -> Arrays:
    """The arrays of `Masks`, as wide as the vocabulary: a token beyond the masks is not allowed. Empty without any."""
    if not masks:
        return []
    words = -(-vocabulary // WORD)
    words_MW = np.zeros((len(masks), words), np.int32)
    for row, mask_W in enumerate(masks):
        words_MW[row, : len(mask_W)] = mask_W[:words]
    return [words_MW, mask_of_R]


def _allowed(sequences: list[Sequence], vocabulary: int) -> Arrays:
    """The arrays of the masks that settings make."""
    masks: list[NDArray[np.int32]] = []
    mask_of_R = np.full(len(sequences), -1)
    for row, sequence in enumerate(sequences):
        words_W = allowed_words(sequence, vocabulary)
        if words_W is not None:
            mask_of_R[row] = len(masks)
            masks.append(words_W)
    return _masks(masks, mask_of_R, vocabulary)


def _draws(sequences: list[Sequence], vocabulary: int) -> tuple[bool, Arrays]:
    """Whether some row that draws cuts, and the arrays of `Draws`; none if every row is greedy."""
    greedy = (0.0, vocabulary, 1.0, 0.0, 0.0)
    drawing = [sequence.request.sampling.temperature > 0 for sequence in sequences]
    if not any(drawing):
        return False, []
    rows = zip(sequences, drawing, strict=True)
    params_R = [row_parameters(sequence, 0, vocabulary) if draws else greedy for sequence, draws in rows]
    temperature_R, top_k_R, top_p_R, min_p_R, u_R = np.array(params_R, np.float64).T.copy()
    temperature_R[drawing] = np.maximum(temperature_R[drawing], MIN_TEMPERATURE)
    cuts = bool(((top_k_R < vocabulary) | (top_p_R < 1) | (min_p_R > 0)).any())
    return cuts, [temperature_R, top_k_R, top_p_R, _float32_from(min_p_R), u_R]


def _float32_from(min_p_R: NDArray[np.float64]) -> NDArray[np.float64]:
    """The least float32 values that are not below these: float32 weights reach the ones where they reach the others."""
    nearest_R = min_p_R.astype(np.float32)
    above_R = np.nextafter(nearest_R, np.float32(2))
    return np.where(nearest_R < min_p_R, above_R, nearest_R).astype(np.float64)


class LaunchedScores:
    """Log-probabilities of prompt tokens, not waited for."""

    def __init__(self, tensors: list[Tensor], wanted: list[tuple[int, int]]) -> None:
        self._wanted = wanted
        self._fetched = Fetched(tensors)

    def results(self) -> tuple[tuple[Logprob, ...] | None, ...]:
        """Those of each chunk; None if a row of it is not finite. Waits for the device."""
        fetched = self._fetched.wait()
        if not fetched:
            return ()
        rows = iter(as_logprobs(fetched, [most for count, most in self._wanted for _ in range(count)]))
        chunks = ([next(rows) for _ in range(count)] for count, _ in self._wanted)
        found = [(len(chunk), tuple(each for each in chunk if each)) for chunk in chunks]
        return tuple(each if len(each) == count else None for count, each in found)


def launch_scores(logits_NV: Tensor, wanted: list[tuple[list[int], int | None]]) -> LaunchedScores:
    """Score prompt tokens: of each chunk, in the order of the rows, its tokens and how many alternatives it wants."""
    counts = [(len(tokens), most or 0) for tokens, most in wanted]
    if not counts:
        return LaunchedScores([], [])
    (token_N,) = upload([np.array([token for tokens, _ in wanted for token in tokens])], logits_NV.device)
    return LaunchedScores(list(scores(logits_NV, token_N, max(most for _, most in counts))), counts)
