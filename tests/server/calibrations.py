"""A made-up calibration of the model of `tests.server.fakes`: three layers, trained at 4 of 1 to 8."""

from weights.calibration import FORMAT, Calibration, Option, Quality, Speed

LAYERS, TRAINED = 3, 4
LOSSES = {1: 1.6, 2: 1.5, 4: 1.4, 8: 1.35}


def option(name: str, counts: tuple[int, ...], loss: float, **rule: object) -> Option:
    """One option: each expert costs as much as all the rest of the model."""
    pairs = sum(counts)
    itl = 1.0 + pairs / LAYERS
    return Option(
        name=name,
        counts=counts,
        quality=Quality(
            loss=loss,
            perplexity=round(2.718281828**loss, 4),
            agreement=1.0 if counts == (TRAINED,) * LAYERS else 0.9,
            kl=0.0 if counts == (TRAINED,) * LAYERS else 0.05,
            relative=round(2.718281828 ** (LOSSES[TRAINED] - loss), 4),
        ),
        speed=Speed({"1": itl, "16": 4 * itl}, {"1": 1000 / itl, "16": 4000 / itl}, 5000.0),
        pairs_per_token=float(pairs),
        bytes_per_token=1e6 * (1 + pairs),
        flops_per_token=2e6 * (1 + pairs),
        relative_cost=itl / (1 + TRAINED),
        **rule,  # type: ignore[arg-type]
    )


def calibration(checkpoint: str = "0" * 64) -> Calibration:
    """Four counts, a profile at the cost of 2, and the count 2 repaired."""
    counts = [option(f"k{count}", (count,) * LAYERS, loss) for count, loss in LOSSES.items()]
    others = [
        option("cost2", (1, 1, 4), 1.45),
        option("k2-repaired", (2, 2, 2), 1.44, repair=True, normaliser="kept"),
    ]
    return Calibration(
        format=FORMAT,
        checkpoint=checkpoint,
        model="tiny",
        version="1",
        created="2026-11-27T00:00:00Z",
        machine="a machine",
        dtype="float32",
        kernels="avx2",
        text="some stories",
        tokens=4096,
        trained=TRAINED,
        layers=LAYERS,
        options=(*counts, *others),
        profiles={"cost2": (1, 1, 4)},
        normalisers={"2": "kept"},
        thresholds={"2": 0.3},
        repaired=(2,),
        aiq=0.9,
    )
