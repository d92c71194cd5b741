"""The one exception for what a user can mend, and the search for the name they probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Wrong input: the message says what was found, where, and what was expected.

    Programs print the message without a traceback; anything else that is raised is a bug.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """ " - did you mean 'x'?" for the known name closest to `name`, or an empty string when none is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" - did you mean {found[0]!r}?" if found else ""


def listing(names: Iterable[str], most: int = 5) -> str:
    """`a, b, c and 7 more`: names for an error message, cut to a readable number."""
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
