"""Values of files that others wrote, as what they stand for: ids, numbers, yes and no; nothing else is guessed.

Each function raises `ValueError` with a phrase for an error message, such as "'x' is no number".
"""

import math
import re
from typing import Any

_YES = frozenset({"1", "true", "yes", "y", "t"})
_NO = frozenset({"0", "false", "no", "n", "f", "", "unspecified", "unknown", "none", "null"})
_EXACT = 2**53  # whole floats from here on have lost digits
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def key(value: Any) -> str:
    """An id as it is compared: 1, 1.0 and "1" are the same one. It is a name, with which nothing is computed."""
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return str(int(value))
    if isinstance(value, bool) or not isinstance(value, int | float | str) or value != value:
        raise ValueError(f"{shown(value)} is not a number or text")
    found = str(value)
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{shown(value)} holds half of a character") from error
    return found


def number(value: Any) -> float:
    """A number, also one that is written as text; it may be infinite or no number (NaN)."""
    text = isinstance(value, str) and _NUMBER.fullmatch(value.strip())
    if isinstance(value, bool) or not (text or isinstance(value, int | float)):
        raise ValueError(f"{shown(value)} is no number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{shown(value)} is too large") from error


def whole(value: Any) -> int:
    """A whole number, also as 96.0 or "96"."""
    found = number(value)
    if not found.is_integer():
        raise ValueError(f"{shown(value)} is no whole number")
    return int(found)


def flag(value: Any) -> bool:
    """Yes or no, in any of the ways in which files say so; what is not stated is no."""
    if value is None or isinstance(value, bool):
        return bool(value)
    text = value.strip().lower() if isinstance(value, str) else key(value)
    if text in _YES or text in _NO:
        return text in _YES
    try:
        found = number(text)
    except ValueError:
        found = math.nan
    if found not in (0, 1):
        raise ValueError(f"{shown(value)} is neither 0 nor 1")
    return found == 1


def shown(value: Any) -> str:
    """A value for an error message, on one line and cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:37]}..."
