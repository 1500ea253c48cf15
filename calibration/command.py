"""The commands `moedial calibrate`, `expert-set`, `extract` and `pack`: their options, what they print, exit statuses.

What measures is imported when it runs.
"""

import inspect
import logging
import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_type_hints

import typer

from calibration.options import Options
from engine.imports import uncollected
from model.options import DType, Quantize, QuantizeLayers

INTERRUPTED = 130  # exit status after Ctrl-C


def calibrate(**flags: Any) -> None:
    """Measure what each expert count keeps and costs; writes calibration.json beside the weights.

    Ctrl-C leaves what is done; the same command goes on from there.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read when torch is imported, whose waiting threads spin
    logging.basicConfig(level=logging.WARNING, format="moedial: %(message)s")
    with uncollected():
        from calibration.calibrate import run

    try:
        run(Options(**flags))
    except KeyboardInterrupt:
        typer.echo("\nmoedial: stopped; the same command goes on from here", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _parameters() -> list[inspect.Parameter]:
    """The options as parameters that typer understands."""
    kinds = get_type_hints(Options, include_extras=True)
    found = []
    for field in fields(Options):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        keyword = inspect.Parameter.KEYWORD_ONLY
        found.append(inspect.Parameter(field.name, keyword, default=default, annotation=kinds[field.name]))
    return found


calibrate.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
calibrate.__annotations__ = {parameter.name: parameter.annotation for parameter in _parameters()}


def expert_set(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a GGUF file, a bundled model's name, or a hub id")
    ],
    text: Annotated[list[Path], typer.Option(help="UTF-8 text of the task; repeatable", exists=True, dir_okay=False)],
    keep: Annotated[str, typer.Option(help="Experts of each layer to keep: 25%, or 8")],
    name: Annotated[str, typer.Option(help="The set's name")] = "task",
    tokens: Annotated[int, typer.Option(help="About how many tokens of text are read", min=1)] = 65536,
    other: Annotated[
        list[Path] | None,
        typer.Option(help="Text of another kind, for its loss; repeatable", exists=True, dir_okay=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where the set goes", file_okay=False, show_default="beside the weights, or a cache folder"),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder with the tokenizer, as in serve", exists=True, file_okay=False)
    ] = None,
) -> None:
    """Measure which experts a task's text uses; writes expert-sets/NAME.json, for extract."""
    with uncollected():
        from calibration.expert_sets import make_set

    found, path = make_set(model, text, keep, name, tokens, other or [], output, tokenizer)
    print(
        f"{found.kept} of {found.num_experts} experts of each layer hold {min(found.mass):.1%} of the gate mass or more"
    )
    for title, loss in (("the task's text", found.task), ("other text", found.other)):
        if loss is not None:
            print(f"loss on {title}: {loss.all:.4f} with all experts, {loss.kept:.4f} with those of the set")
    print(f"written to {path}")


def extract(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model that the set was measured on")],
    name: Annotated[str, typer.Argument(metavar="SET", help="The set's name, or its file")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder")],
) -> None:
    """Write a smaller checkpoint that has only the experts of a set; it loads as any other."""
    from weights.calibration import checkpoint_hash
    from weights.expert_sets import find, read
    from weights.extract import extract as write_extract
    from weights.folder import resolve_model

    source = resolve_model(model)
    path = Path(name) if name.endswith(".json") else find(source, name)
    found = read(path, checkpoint_hash(source))
    write_extract(source, found, out)
    print(f"{out} has {found.kept} of {found.num_experts} experts of each layer")


def pack(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a GGUF file, a bundled model's name, or a hub id")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder")],
    dtype: Annotated[str, typer.Option(help="As of serve")] = "auto",
    quantize: Annotated[str, typer.Option(help="As of serve")] = "none",
    quantize_layers: Annotated[str, typer.Option(help="As of serve")] = "experts",
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder with the tokenizer, as in serve", exists=True, file_okay=False)
    ] = None,
) -> None:
    """Write a model as the CPU's kernels read it: serve maps the folder, and starts at once."""
    for name, value, kind in (
        ("dtype", dtype, DType),
        ("quantize", quantize, Quantize),
        ("quantize-layers", quantize_layers, QuantizeLayers),
    ):
        if value not in get_args(kind):
            raise typer.BadParameter(f"{value!r:.80} is not one of {', '.join(get_args(kind))}", param_hint=f"--{name}")
    from engine.packing import pack_model

    kinds = cast(DType, dtype), cast(Quantize, quantize), cast(QuantizeLayers, quantize_layers)
    pack_model(model, out, *kinds, tokenizer=tokenizer)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out} has {size / 1e9:.2f} GB; serve it with the same --dtype, --quantize and --quantize-layers")
