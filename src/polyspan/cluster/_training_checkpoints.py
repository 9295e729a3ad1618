"""What a checkpoint of training must agree with before a fit goes on from it."""

from numbers import Integral
from pathlib import Path
from typing import Any


def seed_word(random_state: Any) -> str:
    """Return what tells one ``random_state`` from another in a file; generators, which move on, are all alike."""
    plain = random_state is None or isinstance(random_state, Integral)
    return str(random_state) if plain else "a generator"


def check_same_fit(path: Path, told: dict[str, Any], mine: dict[str, Any]) -> None:
    """Refuse a checkpoint of another fit by the first thing that differs; what an older file does not tell may differ.

    Raises
    ------
    ValueError
        Naming what differs, and for a parameter both values.
    """
    for name, value in mine.items():
        if name != "params":
            if told.get(name, value) != value:
                raise ValueError(f"checkpoint {path} belongs to another fit ({name} differs); remove it to begin anew")
            continue
        for key, own in value.items():
            theirs = told.get(name, {}).get(key, own)
            if theirs != own:
                raise ValueError(
                    f"checkpoint {path} belongs to another fit, with {key}={theirs} in place of {own}; remove it to "
                    "begin anew"
                )
