"""``polyspan gaunt race``: the product of spherical-harmonic features against that of e3nn, on this machine."""

import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from ._output import say, show_json, show_table

Method = Literal["auto", "dense", "separable", "fourier"]

TOLERANCES = {"float32": 1e-5, "float64": 1e-12}
"""Largest difference to e3nn, as a share of the largest number, that is taken for rounding."""
CHECKED_ROWS = 16
WARM_UP = 3
LEAST_S = 0.005
KINDS = {"forward": "forward", "forward_and_backward": "both ways"}
COLUMNS = (
    "degree", "method", "difference", "forward, ms", "e3nn forward, ms", "forward ratio", "both ways, ms",
    "e3nn both ways, ms", "both ways ratio",
)  # fmt: skip


def race(
    irreps_in1: str,
    irreps_in2: str,
    irreps_out: str | None = None,
    *,
    method: Annotated[list[Method] | None, Parameter(negative="")] = None,
    paths: Literal["even", "all"] = "even",
    rows: int = 64,
    by_degree: Annotated[bool, Parameter(negative="")] = False,
    dtype: Literal["float32", "float64"] = "float32",
    repeats: int = 7,
    device: str = "cpu",
    seed: int = 0,
    json: bool = False,
) -> int:
    """Race the Gaunt product of two features against e3nn's product with the same result.

    First both are compared, outputs and gradients; where they differ by more than rounding nothing is timed, and the
    exit code is 1. Then they run in turns. A ratio is e3nn's time over ours, the median of the rounds: above 1, ours is
    faster.

    Parameters
    ----------
    irreps_in1 : str
        Of the first feature, such as "32x0e+32x1o+32x2e": one multiplicity, each irrep once.
    irreps_in2 : str
        Of the second, with the same multiplicity.
    irreps_out : str
        Of the product; left out, all that can be reached.
    method : list of {"auto", "dense", "separable", "fourier"}
        How the product is computed; left out, auto.
    paths : {"even", "all"}
        Whether only the paths of a product of functions exist, or the odd ones as well.
    rows : int
        Rows a batch, such as atoms or edges.
    by_degree : bool
        Race with the irreps cut off at each degree in turn, too, and say from which on each method is faster.
    dtype : {"float32", "float64"}
        Of the features.
    repeats : int
        Rounds.
    device : str
        Such as cpu or cuda:0; "auto" takes an accelerator where there is one.
    seed : int
        Of the features.
    json : bool
        Print JSON.
    """
    import torch

    from polyspan.nn import GauntTensorProduct
    from polyspan.run import pick_device

    for name, value in (("--rows", rows), ("--repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    how: dict[str, Any] = {"paths": paths, "device": pick_device(device), "dtype": getattr(torch, dtype)}
    methods: list[str] = list(dict.fromkeys(method or ["auto"]))
    whole = GauntTensorProduct(irreps_in1, irreps_in2, irreps_out, **how)
    muls = [_multiplicity(text) for text in (whole.irreps_in1, whole.irreps_in2)]
    if muls[0] != muls[1]:
        raise ValueError(f"irreps_in1 and irreps_in2 must have one multiplicity, got {muls[0]} and {muls[1]}")
    sizes = [(whole.irreps_in1, whole.irreps_in2, whole.irreps_out)]
    if by_degree:
        sizes = _by_degree(irreps_in1, irreps_in2, irreps_out, how)
    races, far = [], []
    for size in sizes:
        products = {name: GauntTensorProduct(*size, method=name, **how) for name in methods}
        found = _race(products, rows, repeats, seed, how["device"], TOLERANCES[dtype])
        degree = max(_degree(part) for text in size[:2] for part in text.split("+"))
        races += [
            {"degree": degree, **dict(zip(("irreps_in1", "irreps_in2", "irreps_out"), size, strict=True)), **row}
            for row in found
        ]
        far += [f"{row['method']} at degree {degree}" for row in found if not row["equal"]]
    wins = {kind: {name: _wins_from(races, name, kind) for name in methods} for kind in KINDS}
    if far:
        say(f"differs from e3nn by more than {TOLERANCES[dtype]:g} and was not timed: {', '.join(far)}")
    told = {"rows": rows, "dtype": dtype, "device": str(how["device"]), "threads": torch.get_num_threads()}
    if json:
        show_json(told | {"races": races} | ({"faster_from_degree": wins} if by_degree else {}))
        return int(bool(far))
    show_table("Ratios are e3nn's time over ours", COLUMNS, [_cells(row) for row in races])
    facts = {"irreps out": sizes[-1][2], **told}
    if by_degree:
        for kind, names in wins.items():
            for name, degree in names.items():
                facts[f"{name} faster {KINDS[kind]}"] = "at no degree" if degree is None else f"from degree {degree}"
    show_table("", ("what", "value"), [(name, str(value)) for name, value in facts.items()])
    return int(bool(far))


def _multiplicity(irreps: str) -> int:
    return int(irreps.partition("x")[0])


def _degree(part: str) -> int:
    """Return the degree of one irrep, such as "8x1o"."""
    match = re.fullmatch(r"\d+x(\d+)[eo]", part)
    assert match is not None
    return int(match[1])


def _by_degree(in1: str, in2: str, out: str | None, how: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the irreps cut off at each degree; degrees that change nothing, or leave nothing, are left out."""
    from polyspan.nn import GauntTensorProduct

    whole = GauntTensorProduct(in1, in2, out, **how)
    inputs = [text.split("+") for text in (whole.irreps_in1, whole.irreps_in2)]
    found = []
    for degree in sorted({_degree(part) for parts in inputs for part in parts}):
        cut = ["+".join(part for part in parts if _degree(part) <= degree) for parts in inputs]
        if not all(cut):
            continue
        reached = GauntTensorProduct(*cut, **how).irreps_out.split("+")
        asked = reached if out is None else [part for part in whole.irreps_out.split("+") if part in reached]
        if asked:
            found.append((cut[0], cut[1], "+".join(asked)))
    return found


def _race(
    products: Mapping[str, Any], rows: int, repeats: int, seed: int, device: Any, tolerance: float
) -> list[dict[str, Any]]:
    """Compare products of one shape with e3nn's, and time those that are equal in turns with it."""
    import torch

    from polyspan.nn import equivalent_e3nn_product
    from polyspan.run import torch_generator

    first = next(iter(products.values()))
    with warnings.catch_warnings():
        # What e3nn says of its own compiler is nothing that a user of ours can change.
        warnings.simplefilter("ignore")
        twin = equivalent_e3nn_product(first)
    twin, dtype = twin.to(device), first.compute_dtype
    generator = torch_generator(seed)
    x, y, g = (
        torch.randn(max(rows, CHECKED_ROWS), irreps.dim, generator=generator, dtype=dtype).to(device)
        for irreps in (twin.irreps_in1, twin.irreps_in2, twin.irreps_out)
    )
    few = [part[:CHECKED_ROWS] for part in (x, y, g)]
    expected, found = _all_of(twin, *few), []
    for name, product in products.items():
        made = _all_of(product, *few)
        shares = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(made, expected, strict=True)]
        off = max(shares) if all(map(math.isfinite, shares)) else math.inf
        found.append({"method": name, "difference": off, "equal": off <= tolerance})
    x, y, g = (part[:rows] for part in (x, y, g))
    equal = {row["method"]: products[row["method"]] for row in found if row["equal"]}
    if not equal:
        return found

    def forward(layer: Any) -> None:
        with torch.no_grad():
            layer(x, y)

    def both_ways(layer: Any) -> None:
        _all_of(layer, x, y, g)

    for kind, work in zip(KINDS, (forward, both_ways), strict=True):
        arms = {"e3nn": partial(work, twin), **{name: partial(work, product) for name, product in equal.items()}}
        times = _times(arms, repeats, device)
        for row in found:
            if row["equal"]:
                row[kind] = _ratio(times[row["method"]], times["e3nn"])
    return found


def _all_of(layer: Any, x: Any, y: Any, g: Any) -> tuple[Any, ...]:
    """Return the product and the gradients of its inner product with ``g``."""
    import torch

    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    z = layer(a, b)
    return (z.detach(), *torch.autograd.grad(z, (a, b), g))


def _times(arms: Mapping[str, Callable[[], None]], repeats: int, device: Any) -> dict[str, list[float]]:
    """Return the seconds of each arm in each round; arms run in turns, so that a slow moment falls on all of them."""
    import torch

    def seconds(arm: Callable[[], None], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            arm()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return (time.perf_counter() - start) / calls

    calls = {}
    for name, arm in arms.items():
        seconds(arm, WARM_UP)
        calls[name] = max(1, math.ceil(LEAST_S / seconds(arm, 1)))
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            times[name].append(seconds(arm, calls[name]))
    return times


def _ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    return {
        "ours_s": statistics.median(ours),
        "e3nn_s": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "least_ratio": ratios[0],
        "greatest_ratio": ratios[-1],
    }


def _wins_from(races: list[dict[str, Any]], method: str, kind: str) -> int | None:
    """Return the lowest degree from which on a method is faster than e3nn at all degrees that were raced."""
    lowest = None
    for row in sorted((row for row in races if row["method"] == method), key=lambda row: -row["degree"]):
        if row.get(kind, {"ratio": 0.0})["ratio"] <= 1:
            break
        lowest = row["degree"]
    return lowest


def _cells(row: Mapping[str, Any]) -> list[str]:
    cells = [str(row["degree"]), row["method"], f"{row['difference']:.1e}"]
    for kind in KINDS:
        timed = row.get(kind)
        if timed is None:
            cells += ["-", "-", "-"]
        else:
            span = f"{timed['ratio']:.2f} ({timed['least_ratio']:.2f} to {timed['greatest_ratio']:.2f})"
            cells += [f"{1e3 * timed['ours_s']:.3f}", f"{1e3 * timed['e3nn_s']:.3f}", span]
    return cells
