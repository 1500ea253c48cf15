"""The calibration of a checkpoint: what each expert count costs and keeps, as measured; how it is stored and checked.

A calibration lies beside the weights as `calibration.json` (see `weights.folder.beside`), or in a cache folder where
that is read-only, and belongs to one checkpoint, which its hash names. `repair.safetensors` beside it holds the
statistics of `RoutingRule.repair`. Not here: how anything is measured (see the package `calibration`). No torch: the
HTTP process reads it.
"""

import hashlib
import os
from pathlib import Path

import msgspec

from model.budget import ExpertBudget, Normaliser, RoutingRule
from model.errors import CheckpointError
from weights.folder import PACKED, beside, read_json
from weights.small_files import small_files

FORMAT = 1
FILE, REPAIR_FILE = "calibration.json", "repair.safetensors"
MAX_BYTES = 16 << 20  # of a calibration file
WHOLE_BYTES = 1 << 30  # of weights that are hashed whole; of more, evenly spaced parts
PART_BYTES, PARTS = 1 << 20, 256


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one option answers, on held-out text, next to the trained count."""

    loss: float  # nats per token
    perplexity: float
    agreement: float  # share of tokens where the most probable next token is that of the trained count
    kl: float  # mean KL divergence from the trained count's distribution, nats per token
    relative: float  # perplexity at the trained count over this perplexity: 1 is as good
    tasks: dict[str, float] = {}  # accuracy on each task file


class Speed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How fast one option runs on the machine that was measured."""

    itl_ms: dict[str, float]  # milliseconds of a decoding step, by the number of sequences in it ("1", "16")
    tokens_per_second: dict[str, float]  # the same as tokens of all sequences together
    prefill_tokens_per_second: float


class Option(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to run the model: a count, a count for each layer, or a count with a routing rule."""

    name: str  # "k4", or the name of a profile or a repaired count: "k4-repaired"
    counts: tuple[int, ...]  # one per MoE layer
    quality: Quality
    speed: Speed | None
    pairs_per_token: float  # (token, expert) pairs, or draws; the mean, where a rule adapts
    bytes_per_token: float  # of weights read for one token alone
    flops_per_token: float
    relative_cost: float  # time per token of one stream over that of the trained count
    normaliser: Normaliser = "trained"
    threshold: float = 0.0
    top_p: float = 0.0
    repair: bool = False

    @property
    def budget(self) -> ExpertBudget:
        """What a request with this option may use."""
        return ExpertBudget(self.counts, rule=RoutingRule(self.normaliser, self.threshold, self.top_p, self.repair))

    @property
    def mean_count(self) -> float:
        """Pairs per token and layer."""
        return self.pairs_per_token / len(self.counts)


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that was measured of one checkpoint."""

    format: int
    checkpoint: str  # its hash
    model: str
    version: str  # of the program that measured
    created: str  # ISO 8601, UTC
    machine: str
    dtype: str
    kernels: str
    text: str  # what was scored, in words
    tokens: int  # scored
    trained: int
    layers: int
    options: tuple[Option, ...]  # uniform counts first, rising; then profiles and rules
    profiles: dict[str, tuple[int, ...]] = {}  # counts per layer, by name
    normalisers: dict[str, Normaliser] = {}  # the best one of each count below the trained, where one helps
    thresholds: dict[str, float] = {}  # the threshold that runs so many experts per token and layer on average
    repaired: tuple[int, ...] = ()  # counts at which repair helps
    repair_hash: str = ""  # SHA-256 of REPAIR_FILE; empty: there is none
    aiq: float = 0.0  # area under the convex hull of quality against cost (RouterBench, arXiv 2403.12031)
    price_per_hour: float = 0.0  # of the machine; 0: not given
    cost_per_million: dict[str, float] = {}  # of tokens, by option, at that price
    quantize: str | None = None  # as `EngineInfo.quantize`; None: the program that measured was too old to say it
    kv_cache_dtype: str = "auto"

    def option(self, name: str) -> Option | None:
        """The option with this name."""
        return next((option for option in self.options if option.name == name), None)


def write(calibration: Calibration, folder: Path) -> Path:
    """Write `calibration.json`, whole or not at all. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / FILE, folder / f".{FILE}.part"
    part.write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=1))
    part.replace(path)
    return path


def read(path: Path, checkpoint: str) -> Calibration:
    """The calibration in a file.

    Raises:
        CheckpointError: the file is damaged, of another format, or of another checkpoint than `checkpoint` (a hash).
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_BYTES} bytes: this is no calibration")
        found = msgspec.json.decode(path.read_bytes(), type=Calibration)
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; `moedial calibrate` writes a new one") from None
    if found.format != FORMAT:
        raise CheckpointError(f"{path} has format {found.format}, not {FORMAT}; `moedial calibrate` writes a new one")
    if found.checkpoint != checkpoint:
        raise CheckpointError(
            f"{path} belongs to another checkpoint ({found.checkpoint[:12]}, this one is {checkpoint[:12]}); "
            "`moedial calibrate` writes a new one"
        )
    return found


def find(model: Path) -> Path | None:
    """Where the calibration of the checkpoint at `model` lies: beside it, else in the cache; None: nowhere."""
    places = (beside(model), cache_folder(model))
    return next((place / FILE for place in places if (place / FILE).is_file()), None)


def cache_folder(model: Path) -> Path:
    """Where a calibration goes if the checkpoint's own folder is read-only."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:16]
    return base / "moedial" / "calibration" / f"{model.name}-{name}"


def checkpoint_hash(model: Path) -> str:
    """SHA-256 of a checkpoint: config.json, and the names, sizes and contents of its weight files.

    Of more than `WHOLE_BYTES` of weights, evenly spaced parts stand for the contents. A packed model has the hash of
    the checkpoint that it was made from.

    Raises:
        CheckpointError: it is packed, and names no hash.
    """
    if (model / PACKED).exists():
        said = read_json(model / PACKED).get("checkpoint")
        if not isinstance(said, str):
            raise CheckpointError(f"{PACKED} does not say of which checkpoint it is: pack the model again")
        return said
    small = small_files(model)
    digest = hashlib.sha256(small.config_bytes)
    files = [file for file in small.weight_files if file.name != REPAIR_FILE]
    whole = sum(file.stat().st_size for file in files) <= WHOLE_BYTES
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        step = PART_BYTES if whole else max(PART_BYTES, size // PARTS)
        with file.open("rb") as opened:
            for start in range(0, size, step):
                opened.seek(start)
                digest.update(opened.read(PART_BYTES))
    return digest.hexdigest()
