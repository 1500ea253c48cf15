"""Expert sets: which experts of a checkpoint a task's text uses, as measured; how they are stored and checked.

A set lies beside the weights as `expert-sets/NAME.json`, or in a cache folder where these are read-only, and belongs to
one checkpoint, which its hash names. Not here: how experts are chosen (`calibration/expert_sets.py`), and the smaller
checkpoint that a set makes (`weights/extract.py`). No torch.
"""

import re
from pathlib import Path

import msgspec

from model.errors import CheckpointError, InvalidRequest
from weights.calibration import cache_folder
from weights.folder import beside, read_text

FORMAT = 1
FOLDER = "expert-sets"
MAX_BYTES = 16 << 20  # of a file
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class Loss(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nats per token of one text at the trained count, with all experts and with those of the set."""

    all: float
    kept: float


class ExpertSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The experts that a task keeps, in every MoE layer equally many."""

    format: int
    name: str
    checkpoint: str  # its hash
    text: str  # the names of the files whose text was read
    tokens: int  # by which experts were chosen
    num_experts: int  # of a layer of the checkpoint
    experts: tuple[tuple[int, ...], ...]  # of each MoE layer those that are kept, rising
    mass: tuple[float, ...]  # of each MoE layer the share of the gate mass that these had
    task: Loss  # on text of the task by which nothing was chosen
    other: Loss | None = None  # on text of another kind

    @property
    def kept(self) -> int:
        """How many experts a layer keeps."""
        return len(self.experts[0])

    @property
    def layers(self) -> tuple[str, ...]:
        """The same experts as `RoutingRule.kept` has them."""
        numbers = range(self.num_experts)
        return tuple("".join("01"[number in layer] for number in numbers) for layer in map(set, self.experts))


def check_name(name: str) -> str:
    """The name of a set, which is a file's name as well.

    Raises:
        InvalidRequest: it is not.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"an expert set's name is 1 to 64 of a-z, 0-9, '.', '_' and '-', first a letter or digit; got {name!r:.80}"
        )
    return name


def write(found: ExpertSet, folder: Path) -> Path:
    """Write `expert-sets/NAME.json` in a folder, whole or not at all. Returns its path."""
    path = folder / FOLDER / f"{check_name(found.name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    part.replace(path)
    return path


def find(model: Path, name: str) -> Path:
    """Where the set of this name lies: beside the checkpoint at `model`, else in the cache.

    Raises:
        InvalidRequest: this is no name of a set.
        CheckpointError: there is none.
    """
    places = [place / FOLDER / f"{check_name(name)}.json" for place in (beside(model), cache_folder(model))]
    for place in places:
        if place.is_file():
            return place
    raise CheckpointError(f"{model} has no expert set {name!r}; `moedial expert-set` makes one")


def every(model: Path) -> dict[str, Path]:
    """All sets of the checkpoint at `model` by their names: those beside it, and those in the cache."""
    places = [place / FOLDER for place in (cache_folder(model), beside(model))]
    paths = [path for place in places for path in sorted(place.glob("*.json")) if _NAME.fullmatch(path.stem)]
    return {path.stem: path for path in paths}


def read(path: Path, checkpoint: str) -> ExpertSet:
    """The set in a file.

    Raises:
        CheckpointError: the file is damaged, of another format, or of another checkpoint than `checkpoint` (a hash).
    """
    try:
        found = msgspec.json.decode(read_text(path, MAX_BYTES), type=ExpertSet)
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; `moedial expert-set` writes a new one") from None
    if found.format != FORMAT:
        raise CheckpointError(f"{path} has format {found.format}, not {FORMAT}; `moedial expert-set` writes a new one")
    if found.checkpoint != checkpoint:
        raise CheckpointError(
            f"{path} belongs to another checkpoint ({found.checkpoint[:12]!r}, this one is {checkpoint[:12]}); "
            "`moedial expert-set` writes a new one"
        )
    _check(path, found)
    return found


def _check(path: Path, found: ExpertSet) -> None:
    """That every layer keeps equally many experts, each of them once and one that there is."""
    if not found.experts or not found.experts[0]:
        raise CheckpointError(f"{path}: experts names none")
    for layer, experts in enumerate(found.experts):
        if len(experts) != found.kept:
            raise CheckpointError(f"{path}: layer {layer} keeps {len(experts)} experts, but layer 0 keeps {found.kept}")
        if list(experts) != sorted(set(experts)) or experts[0] < 0 or experts[-1] >= found.num_experts:
            raise CheckpointError(
                f"{path}: the experts of layer {layer} must be rising numbers from 0 to {found.num_experts - 1}"
            )
