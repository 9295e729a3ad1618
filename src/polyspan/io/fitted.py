"""Fitted things on disk: named arrays in .safetensors, and one JSON header that says what they are."""

import importlib.metadata
import numbers
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyspan.errors import CorruptFile, WrongContent

from ._door import PathLike, suffix_of
from ._slabs import check_numbers, stored_digests, tensor_slabs
from .arrays import as_numbers, check_digest, write_tensors
from .text import parse_json

SCHEMA = 1
READ_SCHEMAS = (1,)
"""The last two schema numbers are read; a golden file of each stands in the tests."""


class Fitted(NamedTuple):
    """A fitted thing: its class name, arrays, parameters, facts about it, and the whole header."""

    kind: str
    arrays: dict[str, np.ndarray]
    params: dict[str, Any]
    about: dict[str, Any]
    header: dict[str, Any]


def save_fitted(
    path: PathLike,
    *,
    kind: str,
    arrays: Mapping[str, Any],
    params: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
    data_digest: str | None = None,
) -> Path:
    """Write a fitted thing atomically, and return the path.

    The header holds schema number, kind, params, about, versions of polyspan, NumPy and Python, and the SHA-256 of
    each array. The same thing fitted by the same versions gives the same bytes.

    Parameters
    ----------
    path : path-like
        Ends in ``.safetensors``.
    kind : str
        Class name.
    arrays : mapping of str to array or tensor
        At least one.
    params, about : mapping
        JSON types; NumPy scalars are rewritten. ``about`` is for facts: model names, scores.
    data_digest : str, optional
        Digest of what it was fitted on.

    Raises
    ------
    TypeError, ValueError
        An entry has no JSON form or is not finite (it is named), an array holds no numbers, or the suffix is another.
    """
    if Path(path).suffix.lower() != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {Path(path).name!r}")
    if not arrays:
        raise ValueError("arrays must hold at least one array, got none")
    header = {
        "schema": SCHEMA,
        "kind": kind,
        "params": dict(params),
        "about": dict(about or {}),
        "data": data_digest,
        "versions": {
            "polyspan": importlib.metadata.version("polyspan"),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    write_tensors(path, {name: as_numbers(arrays[name], name) for name in arrays}, header, {})
    return Path(path)


def load_fitted(path: PathLike, kind: str | tuple[str, ...] | None = None, *, finite: bool = True) -> Fitted:
    """Read a fitted thing that :func:`save_fitted` wrote, after comparing the digest of each array.

    Parameters
    ----------
    path : path-like
    kind : str or tuple of str, optional
        The class name, or names, that is asked for.
    finite : bool
        Refuse NaN and infinity in the arrays.

    Raises
    ------
    UnreadableFile, CorruptFile, UntrustedFile, WrongContent, TooLarge
        A bit that flipped is ``CorruptFile``; another kind, or a schema that this version does not know,
        ``WrongContent``.
    """
    suffix_of(path, (".safetensors",))
    slabs, metadata = tensor_slabs(path)
    if "polyspan" not in metadata:
        raise WrongContent(path, found="tensors without our header", expected="a file of save_fitted")
    header = parse_json(metadata["polyspan"], path, "metadata polyspan")
    if not isinstance(header, dict) or "schema" not in header:
        raise WrongContent(path, found="named arrays", expected="a file of save_fitted")
    if header["schema"] not in READ_SCHEMAS:
        raise WrongContent(
            path, found=f"schema {header['schema']}", expected=f"schema {', '.join(map(str, READ_SCHEMAS))}"
        )
    for name, sort in (("kind", str), ("params", dict), ("about", dict), ("versions", dict)):
        if not isinstance(header.get(name), sort):
            raise CorruptFile(
                path, found=f"{name} = {header.get(name)!r}", expected=f"a {sort.__name__}", where="header"
            )
    wanted = (kind,) if isinstance(kind, str) else kind
    if wanted is not None and header["kind"] not in wanted:
        raise WrongContent(path, found=f"a fitted {header['kind']}", expected=f"a fitted {' or '.join(wanted)}")
    digests = stored_digests(path, metadata)
    if set(digests) != set(slabs):
        raise CorruptFile(path, found=f"digests of {sorted(digests)}", expected=f"one for each of {sorted(slabs)}")
    arrays = {}
    for name in sorted(slabs):
        check_numbers(slabs[name], booleans=True)
        check_digest(slabs[name], digests[name])
        arrays[name] = slabs[name].read(None)
        if finite and arrays[name].dtype.kind == "f" and not np.isfinite(arrays[name]).all():
            raise WrongContent(path, found="NaN or infinity", expected="finite numbers", where=f"tensor {name}")
    return Fitted(header["kind"], arrays, header["params"], header["about"], header)


def constructor_params(estimator: Any) -> dict[str, Any]:
    """Return the parameters of a scikit-learn estimator for a header, without looking into nested ones.

    A ``random_state`` that is a generator is a state and no number: it becomes None.
    """
    params = estimator.get_params(deep=False)
    if "random_state" in params:
        seed = params["random_state"]
        params["random_state"] = int(seed) if isinstance(seed, numbers.Integral) else None
    return params


def header_classes(classes: np.ndarray) -> dict[str, Any]:
    """Return ``classes_`` of a classifier (C,), numbers or text, in JSON types; :func:`classes_of` reads them."""
    return {"dtype": classes.dtype.str, "values": classes.tolist()}


def classes_of(stored: Mapping[str, Any]) -> np.ndarray:
    """Return the classes (C,) that :func:`header_classes` wrote."""
    return np.array(stored["values"], dtype=object if stored["dtype"] == "|O" else stored["dtype"])
