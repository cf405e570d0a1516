"""The words that a certificate has for a subspace."""

import re

DIRECTIONS = "directions in "
TOP = "top eigenspace in "
# The regular expression of `where` is a user's text, quoted as Python quotes it.
_QUOTED = r"""'([^'\\\n]|\\[^\n])*'|"([^"\\\n]|\\[^\n])*\""""
BASE_NAME = rf"full|leaves matching ({_QUOTED})|orthonormal|span|gaussian|count_sketch|given operator"


def is_certified_name(name: str) -> bool:
    """Whether `certified_name` may say it."""
    return re.fullmatch(rf"({DIRECTIONS}|{TOP})*({BASE_NAME})", name) is not None
