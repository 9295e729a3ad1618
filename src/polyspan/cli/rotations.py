"""``polyspan rotations convert`` and ``breaks``: files of rotations, and where along a path their numbers jump."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from cyclopts import Parameter

from ._output import check_target, say, show_json, show_table
from ._pictures import Out, check_drawing
from ._places import check_places

Kind = Literal["quaternion", "axis-angle", "euler", "rotation5d", "rotation6d", "rotation9d", "matrix"]
Judged = Literal["quaternion", "axis-angle", "euler", "rotation5d", "rotation6d", "rotation9d"]
Order = Literal["wxyz", "xyzw"]
Convention = Literal["columns", "rows", "interleaved"]

WIDTHS = {
    "quaternion": 4, "axis-angle": 3, "euler": 3, "rotation5d": 5, "rotation6d": 6, "rotation9d": 9, "matrix": 9,
}  # fmt: skip
OPTIONS = {"order": "quaternion", "sequence": "euler", "degrees": "euler", "convention": "rotation6d"}
LEFT_OUT = {"degrees": False, "convention": "columns"}
NEEDED = {"order": "wxyz or xyzw, as libraries disagree", "sequence": "such as XYZ (moved axes) or xyz (fixed ones)"}
LOST = {
    "quaternion": "a quaternion of length 0",
    "rotation5d": "five numbers at which the map is not defined",
    "rotation6d": "two parallel vectors, or a zero one",
    "rotation9d": "a matrix with more than one nearest rotation",
}
TEXTS = (".csv", ".tsv")
TARGETS = (".npy", ".npz", ".safetensors", ".parquet", ".arrow", ".feather", ".fvecs", ".csv")
WARNED = re.compile(r"(\d+) (.+?)(?:: radians are expected.*)?; rows \[(\d+).*")
REFUSED = re.compile(r"R must hold rotations .*\[(\d+).*")
SHOWN = 8


class Side(NamedTuple):
    """A form of rotations with its conventions: rows (n, width) to matrices (n, 3, 3) and back."""

    kind: str
    options: dict[str, Any]

    def to_matrix(self, rows: Any, check: bool = True) -> Any:
        if self.kind == "matrix":
            return rows.reshape(-1, 3, 3)
        return self._half("{}_to_matrix")(rows, check=check, **self.options)

    def from_matrix(self, R: Any, check: bool = True) -> Any:
        if self.kind == "matrix":
            return R.reshape(-1, 9)
        return self._half("matrix_to_{}")(R, check=check, **self.options)

    def _half(self, name: str) -> Callable[..., Any]:
        from polyspan.nn import rotation

        return getattr(rotation, name.format(self.kind.replace("-", "_")))


def convert(
    source: Path,
    *,
    from_: Annotated[Kind, Parameter(name="--from")],
    to: Kind,
    out: Out,
    order: Order | None = None,
    sequence: str | None = None,
    degrees: Annotated[bool, Parameter(negative="")] = False,
    convention: Convention | None = None,
    to_order: Order | None = None,
    to_sequence: str | None = None,
    to_degrees: bool | None = None,
    to_convention: Convention | None = None,
    complete: Annotated[bool, Parameter(negative="")] = False,
    member: str | None = None,
    column: str | None = None,
    id_column: str | None = None,
    batch_rows: int = 65536,
    json: bool = False,
) -> None:
    """Turn a file of rotations of any size from one form into another.

    All rows are looked at before any is written, so that nothing is written where one is wrong; then batches are
    streamed. Text tables are read and written whole. The source is never changed. Conventions are for the side that has
    them; where both sides are of one form, --to-... are those of the result.

    Parameters
    ----------
    source : Path
        One rotation a row (.npy, .npz, .parquet, .arrow, .feather, .safetensors, .fvecs, .csv, .tsv).
    from_ : {"quaternion", "axis-angle", "euler", "rotation5d", "rotation6d", "rotation9d", "matrix"}
        What a row holds: 4, 3, 3, 5, 6, 9 or 9 numbers. A matrix, row by row, must be a rotation; of rotation9d the
        nearest one is taken.
    to : {"quaternion", "axis-angle", "euler", "rotation5d", "rotation6d", "rotation9d", "matrix"}
        What it is turned into.
    out : Path
        Where the result goes; the suffix says the format. Ids of a table are kept where the result is a table.
    order : {"wxyz", "xyzw"}
        Where the real part of quaternions stands; must be given for them.
    sequence : str
        Axes of Euler angles: capitals turn about the moved axes, small letters about the fixed ones; must be given.
    degrees : bool
        Euler angles are in degrees; radians otherwise.
    convention : {"columns", "rows", "interleaved"}
        What the six numbers are: the first two columns one after the other, as where left out, two rows, or two columns
        entry by entry.
    to_order : {"wxyz", "xyzw"}
        From quaternions to quaternions, that of the result.
    to_sequence : str
        From Euler angles to Euler angles, that of the result.
    to_degrees : bool
        From Euler angles to Euler angles, whether the result is in degrees; left out, as the source.
    to_convention : {"columns", "rows", "interleaved"}
        From six numbers to six numbers, that of the result.
    complete : bool
        Take a rotation for rows that determine none, such as the identity for quaternions of length 0; otherwise they
        are refused.
    member : str
        Member of an .npz or .safetensors file.
    column : str
        Vector column of a table.
    id_column : str
        Id column of a table.
    batch_rows : int
        Rows a batch.
    json : bool
        Print JSON.
    """
    from polyspan.io import EmbeddingReader, read_array, transform_file, write_array
    from polyspan.run import Progress

    check_target(out, "--out", *TARGETS)
    check_places(read=(source,), out=out)
    if batch_rows < 1:
        raise ValueError(f"--batch-rows must be at least 1, got {batch_rows}")
    given = {"order": order, "sequence": sequence, "degrees": degrees or None, "convention": convention}
    wanted = {"order": to_order, "sequence": to_sequence, "degrees": to_degrees, "convention": to_convention}
    before, after = _sides(from_, to, given, wanted)
    places: dict[str, Any] = {"member": member, "column": column, "id_column": id_column}
    whole = source.suffix.lower() in TEXTS or out.suffix.lower() in TEXTS
    if whole:
        if id_column is not None:
            raise ValueError(f"--id-column is for tables and not for text, got {source.name} and {out.name}")
        rows = read_array(source, member=member, column=column)
        n_rows, batches = len(rows), iter([(0, rows)])
    else:
        reader = EmbeddingReader(source, **places, batch_rows=batch_rows)
        rows, n_rows = None, reader.n_rows
        _check_width(before, reader.dim, source)
        batches = ((batch.start, batch.rows) for batch in reader.read())
    with Progress(f"looking at {source.name}", n_rows) as shown:
        doubts = _look(_counted(batches, shown), before, after, source, complete)

    def step(rows: Any) -> Any:
        return after.from_matrix(before.to_matrix(rows, check=False), check=False)

    if rows is not None:
        write_array(out, step(rows))
    else:
        with Progress(f"converting {source.name}", n_rows) as shown:
            transform_file(
                source, out, step, dim=WIDTHS[to], **places, batch_rows=batch_rows, fingerprint=repr((before, after)),
                progress=lambda done, _: shown.advance(done - shown.count),
            )  # fmt: skip
    for doubt in doubts:
        say(f"warning: {doubt}")
    told = {"out": str(out), "rows": n_rows, "from": from_, "to": to}
    if json:
        show_json(told | {"warnings": doubts})
        return
    show_table("", ("what", "value"), [(name, str(value)) for name, value in told.items()])


def breaks(
    source: Path,
    *,
    from_: Annotated[Kind, Parameter(name="--from")],
    to: Annotated[list[Judged] | None, Parameter(negative="")] = None,
    order: Order | None = None,
    sequence: str | None = None,
    degrees: Annotated[bool, Parameter(negative="")] = False,
    convention: Convention | None = None,
    factor: float = 10.0,
    member: str | None = None,
    column: str | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Say where along a trajectory a representation jumps although the rotation does not.

    Judged are the numbers that ``polyspan rotations convert`` makes of the rotations, which a network would be taught:
    quaternions with a real part of at least 0, shortest rotation vectors, Euler angles within half a turn. A source
    whose signs or turns were carried on by hand may itself jump elsewhere, or nowhere.

    Parameters
    ----------
    source : Path
        One rotation a row, in the order of the path, at least 3 (.npy, .npz, .parquet, .arrow, .feather, .safetensors,
        .fvecs, .csv, .tsv).
    from_ : {"quaternion", "axis-angle", "euler", "rotation5d", "rotation6d", "rotation9d", "matrix"}
        What a row holds, as for convert.
    to : list of {"quaternion", "axis-angle", "euler", "rotation5d", "rotation6d", "rotation9d"}
        Representations to judge; left out, all, Euler angles only where --sequence is given.
    order : {"wxyz", "xyzw"}
        Where the real part of quaternions stands; must be given where the source holds them.
    sequence : str
        Axes of Euler angles, of the source and of those judged; must be given for them.
    degrees : bool
        The source's Euler angles are in degrees.
    convention : {"columns", "rows", "interleaved"}
        What the source's six numbers are, as for convert.
    factor : float
        A step breaks where the numbers move so many times as far, for the angle turned, as in the median step.
    member : str
        Member of an .npz or .safetensors file.
    column : str
        Vector column of a table.
    plot : Path
        Draw how far the rotation is off that the mean of two rows' numbers stands for, beside the one halfway between
        them (.svg, .png or .pdf): breaks are peaks.
    json : bool
        Print JSON, with all breaks.
    """
    import numpy as np

    from polyspan.io import read_array
    from polyspan.nn import continuity_breaks, geodesic_distance

    check_drawing(plot, "--plot")
    check_places(plot, read=(source,))
    if not factor > 1:
        raise ValueError(f"--factor must be above 1, got {factor}")
    names = list(dict.fromkeys(to or [kind for kind in get_args(Judged) if kind != "euler" or sequence is not None]))
    given = {"order": order, "sequence": sequence, "degrees": degrees or None, "convention": convention}
    before = _trajectory_side(from_, names, given)
    sides = [_own_side(name, {"order": order or "wxyz", "sequence": sequence}) for name in names]
    rows = read_array(source, member=member, column=column)
    if len(rows) < 3:
        raise ValueError(f"{source} must hold at least 3 rotations along a path, got {len(rows)}")
    doubts = _look([(0, rows)], before, Side("rotation9d", {}), source, complete=None)
    R = before.to_matrix(rows, check=False)
    found = {}
    for side in sides:
        kind = side.kind.replace("-", "_")
        steps, told = _caught(lambda kind=kind, own=side.options: continuity_breaks(R, kind, factor=factor, **own))
        doubts += [_doubt(side.kind, *parts) for parts in told]
        found[side.kind] = steps
    for doubt in doubts:
        say(f"warning: {doubt}")
    facts: dict[str, Any] = {
        "rows": len(rows),
        "largest step, degrees": float(np.rad2deg(geodesic_distance(R[:-1], R[1:]).max())),
    }
    if plot is not None:
        facts["plot"] = str(_draw(R, sides, plot))
    if json:
        show_json(facts | {"breaks": found, "warnings": doubts})
        return
    show_table(
        "Steps that break, each from its row to the next",
        ("representation", "breaks", "at rows"),
        [(kind, str(len(steps)), _shortened(steps)) for kind, steps in found.items()],
    )
    show_table("", ("what", "value"), [(k, f"{v:.4f}" if isinstance(v, float) else str(v)) for k, v in facts.items()])


def _sides(from_: str, to: str, given: dict[str, Any], wanted: dict[str, Any]) -> tuple[Side, Side]:
    """Return both sides with the conventions that are theirs, or say which option is wrong or missing."""
    for name, kind in OPTIONS.items():
        if given[name] is not None and kind not in (from_, to):
            raise ValueError(f"--{name} is for {kind}, got it from {from_} to {to}")
        if wanted[name] is not None and not from_ == to == kind:
            raise ValueError(f"--to-{name} is for {kind} on both sides, got it from {from_} to {to}")
        if name in NEEDED and given[name] is None and kind in (from_, to):
            raise ValueError(f"--{name} must be given for {kind}: {NEEDED[name]}")
    other = _told(wanted)
    if from_ == to and all((LEFT_OUT | _told(given))[name] == value for name, value in other.items()):
        raise ValueError(f"--to must be another form than --from, or another convention of it, got {from_} twice")
    _check_sequence(given["sequence"], "--")
    _check_sequence(wanted["sequence"], "--to-")
    return _own_side(from_, given), _own_side(to, given | other)


def _trajectory_side(from_: str, judged: list[str], given: dict[str, Any]) -> Side:
    """Return the side of a path with its conventions, or say which option is wrong or missing."""
    for name, kind in OPTIONS.items():
        users = (from_, *judged) if name == "sequence" else (from_,)
        if given[name] is not None and kind not in users:
            raise ValueError(f"--{name} is for {kind}, got it for {from_}")
        if name in NEEDED and given[name] is None and kind in users:
            raise ValueError(f"--{name} must be given for {kind}: {NEEDED[name]}")
    _check_sequence(given["sequence"], "--")
    return _own_side(from_, given)


def _own_side(kind: str, given: dict[str, Any]) -> Side:
    """Keep of the conventions those that a form has."""
    return Side(kind, {k: v for k, v in _told(given).items() if OPTIONS[k] == kind})


def _told(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _check_sequence(sequence: str | None, mark: str) -> None:
    """Refuse axes that the library does not know, by the name of their option."""
    import numpy as np

    from polyspan.nn import euler_to_matrix

    if sequence is None:
        return
    try:
        euler_to_matrix(np.zeros(3), sequence=sequence, check=False)
    except ValueError as error:
        raise ValueError(f"{mark}{error}") from None


def _check_width(side: Side, width: int, source: Path) -> None:
    if width != WIDTHS[side.kind]:
        raise ValueError(f"--from {side.kind} is for rows of {WIDTHS[side.kind]} numbers, got {width} in {source}")


def _counted(batches: Iterable[tuple[int, Any]], shown: Any) -> Iterator[tuple[int, Any]]:
    for start, rows in batches:
        yield start, rows
        shown.advance(len(rows))


def _look(
    batches: Iterable[tuple[int, Any]], before: Side, after: Side, source: Path, complete: bool | None
) -> list[str]:
    """Look at all rows of a file: refuse those that stand for no rotation, and return what makes one doubt others.

    ``complete`` says whether the library may complete rows that determine none; None, that nobody can ask for it.
    """
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for start, rows in batches:
        _check_width(before, rows.shape[1], source)
        R, told = _caught(lambda rows=rows: before.to_matrix(rows))
        if told and before.kind in LOST and not complete:
            raise ValueError(
                f"{source} must hold rows that determine a rotation, got {LOST[before.kind]} at row "
                f"{start + told[0][2]}" + ("" if complete is None else "; --complete takes one for it")
            )
        try:
            more = _caught(lambda R=R: after.from_matrix(R))[1]
        except ValueError as error:
            match = REFUSED.fullmatch(str(error))
            if match is None:
                raise
            raise ValueError(
                f"{source} must hold rotations for --from {before.kind}, got another matrix at row "
                f"{start + int(match[1])}; --from rotation9d takes the nearest"
            ) from None
        for kind, (count, text, first) in [(before.kind, t) for t in told] + [(after.kind, t) for t in more]:
            known, least = found.get((kind, text), (0, start + first))
            found[kind, text] = known + count, least
    return [_doubt(kind, count, text, first) for (kind, text), (count, first) in found.items()]


def _caught(work: Callable[[], Any]) -> tuple[Any, list[tuple[int, str, int]]]:
    """Return what comes of some work and what the conversions warn of: how many rows, what of them, the first one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = work()
    told = []
    for warning in caught:
        match = WARNED.fullmatch(str(warning.message))
        if match is None:
            say(f"warning: {warning.message}")
        else:
            told.append((int(match[1]), match[2], int(match[3])))
    return made, told


def _doubt(kind: str, count: int, text: str, first: int) -> str:
    what = {"euler": "; radians are expected, or --degrees", "axis-angle": "; radians are expected"}
    return f"{count} {text}, the first at row {first}" + (what.get(kind, "") if "4 pi" in text else "")


def _draw(R: Any, sides: list[Side], path: Path) -> Path:
    """Draw how far the mean of two rows' numbers is off the rotation halfway between them, along the path."""
    from polyspan.nn import axis_angle_to_matrix, matrix_to_axis_angle
    from polyspan.nn.rotation_plots import plot_error_along_path

    turns = matrix_to_axis_angle(R[:-1].swapaxes(-1, -2) @ R[1:], project=True, check=False)
    halfway, made = R[:-1] @ axis_angle_to_matrix(turns / 2), {}
    for side in sides:
        numbers = side.from_matrix(R, check=False)
        made[side.kind] = side.to_matrix((numbers[:-1] + numbers[1:]) / 2, check=False)
    return plot_error_along_path(halfway, made, path)


def _shortened(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:SHOWN])) + (", ..." if len(steps) > SHOWN else "")
