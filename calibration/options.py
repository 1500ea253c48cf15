"""The options of `moedial calibrate`, from which its flags and their help are derived. It reads no file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from model.errors import InvalidRequest
from model.options import DType, KVCacheDType, Quantize, QuantizeLayers

TASK_HELP = 'Multiple choice, a JSON object a line: {"prompt", "choices", "answer": index}; repeatable'


def _option(text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, **limits)


def _files(name: str, text: str) -> Any:
    return _option(text, name, exists=True, dir_okay=False, show_default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure, and how."""

    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a GGUF file, a bundled model's name, or a hub id")
    ]
    text: Annotated[
        list[Path] | None, _files("--text", "UTF-8 text to score, repeatable; without it the model writes one itself")
    ] = None
    tasks: Annotated[list[Path] | None, _files("--tasks", TASK_HELP)] = None
    counts: Annotated[str, _option("Counts to measure, as 1,2,4", show_default="all to 8, then doubling")] = ""
    price_per_hour: Annotated[float, _option("Of this machine, for the cost of a million tokens", min=0)] = 0.0
    minutes: Annotated[float, _option("About how long it may take: decides how much is scored", min=0.01)] = 4.0
    output: Annotated[
        Path | None,
        _option("Where results go", file_okay=False, show_default="beside the weights, or a cache folder"),
    ] = None
    plot: Annotated[
        list[Path] | None, _option("Draw quality against speed into FILE.svg or FILE.png", show_default=False)
    ] = None
    tokenizer: Annotated[
        Path | None, _option("A folder with the tokenizer, as in serve", exists=True, file_okay=False)
    ] = None
    dtype: Annotated[DType, _option("Number format, as in serve")] = "auto"
    quantize: Annotated[Quantize, _option("8-bit or 4-bit weights, as in serve")] = "none"
    quantize_layers: Annotated[QuantizeLayers, _option("What --quantize covers")] = "experts"
    kv_cache_dtype: Annotated[KVCacheDType, _option("What keys and values are kept in, as in serve")] = "auto"
    threads: Annotated[int, _option("Compute threads; 0: one per core", min=0, max=1024)] = 0
    allow_extrapolated_experts: Annotated[bool, _option("As in serve", "--allow-extrapolated-experts")] = False
    searches: Annotated[bool, _option("Also look for profiles, normalisers and repairs that help")] = True

    @property
    def texts(self) -> list[Path]:
        """Files to score."""
        return self.text or []

    @property
    def task_files(self) -> list[Path]:
        """Files of questions."""
        return self.tasks or []

    @property
    def plots(self) -> list[Path]:
        """Files to draw into."""
        return self.plot or []

    @property
    def asked_counts(self) -> tuple[int, ...]:
        """`1,2,4` as numbers.

        Raises:
            InvalidRequest: a word that is no whole number of at least 1.
        """
        words = [word.strip() for word in self.counts.split(",") if word.strip()]
        if wrong := [word for word in words if not word.isdecimal() or int(word) < 1]:
            raise InvalidRequest(f"--counts takes whole numbers from 1 on, as 1,2,4; got {wrong[0]!r:.40}", "counts")
        return tuple(int(word) for word in words)
