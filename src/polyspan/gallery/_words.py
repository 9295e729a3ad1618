"""Numbers, dates, durations and code as words on a page; the same everywhere, whatever the locale."""

import io
import keyword
import math
import tokenize
from collections.abc import Callable, Iterable, Sequence
from datetime import date

from markupsafe import Markup, escape

# strftime's names follow the locale.
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number_format(values: Iterable[float]) -> Callable[[float], str]:
    """Return one way to write all these numbers: three significant digits of the largest, a true minus sign."""
    top = max((abs(value) for value in values), default=0.0)
    exponent = math.floor(math.log10(top)) if top > 0 else 0
    if not -4 <= exponent <= 6:

        def scientific(value: float) -> str:
            if value == 0:
                return "0"
            digits, power = f"{value:.2e}".split("e")
            return f"{digits} × 10{str(int(power)).translate(_SUPERSCRIPT)}".replace("-", "−")

        return scientific
    decimals = max(0, 3 - exponent if exponent >= 0 else 2 - exponent)
    return lambda value: f"{value:,.{decimals}f}".replace("-", "−")


def plain_number(value: float) -> str:
    """Return a number that somebody chose, such as a margin, without the zeros that measured ones get."""
    return f"{value:.6g}".replace("-", "−")


def signed(text: str) -> str:
    """Put a plus before a number that has no minus."""
    return text if text.startswith("−") else f"+{text}"


def day(when: date) -> str:
    """Return a date as ``19 February 2026``."""
    return f"{when.day} {MONTHS[when.month - 1]} {when.year}"


def duration(seconds: int | float) -> str:
    """Return a wall time in its natural unit."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def byte_size(n_bytes: int | float) -> str:
    """Return a size in KiB, MiB or GiB; 0 is what a system that does not tell leaves."""
    if n_bytes <= 0:
        return "not measured"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:,.1f} {unit}"
    return f"{n_bytes / 1024:,.1f} KiB"


def count(number: int, one: str, many: str = "") -> str:
    """Return ``1 system`` or ``3 systems``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def shown_authors(authors: Sequence[str], n_authors: int, limit: int) -> str:
    """Return the first ``limit`` authors and how many more there are; only the number where none is named."""
    if not authors:
        return count(n_authors, "author")
    named = list(authors[:limit])
    rest = max(n_authors, len(authors)) - len(named)
    if rest:
        return f"{', '.join(named)} and {rest} more"
    return f"{', '.join(named[:-1])} and {named[-1]}" if len(named) > 1 else named[0]


def python_markup(code: str) -> Markup:
    """Return Python as HTML with comments, strings and keywords marked; what does not parse comes back plain."""
    lines = [*io.StringIO(code), ""]
    made, line, column = Markup(), 1, 0

    def text_until(row: int, stop: int) -> str:
        if row == line:
            return lines[line - 1][column:stop]
        return lines[line - 1][column:] + "".join(lines[line : row - 1]) + lines[row - 1][:stop]

    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if not token.string or token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
                continue
            made += escape(text_until(*token.start))
            kind = _kind(token)
            piece = escape(token.string)
            made += Markup('<span class="{}">{}</span>').format(kind, piece) if kind else piece
            line, column = token.end
    except (tokenize.TokenError, SyntaxError):
        return escape(code)
    return made + escape(text_until(len(lines), 0))


def _kind(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.COMMENT:
        return "tok-comment"
    if token.type == tokenize.STRING or tokenize.tok_name[token.type].startswith("FSTRING"):
        return "tok-string"
    return "tok-keyword" if token.type == tokenize.NAME and keyword.iskeyword(token.string) else ""
