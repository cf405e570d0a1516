"""The promise of a certificate in words that a data-protection officer can read."""

import math
from typing import Any

_UNITS = {
    "one record": "any single record",
    "all records with one unit id": "all records of any single person (or other unit) together",
}
_CHANGES = {
    "REPLACE_SPECIAL": "been left out",
    "ADD_OR_REMOVE_ONE": "been left out, or been added",
    "REPLACE_ONE": "been replaced by anybody else's",
}


def report(certificate: Any) -> str:
    """A paragraph that says what is promised, to whom, what was spent, and on what it rests.

    Args:
      certificate: of a release, or the release itself.

    Formal guarantee: a function of the certificate, which is public; it checks nothing, `verify` does.
    """
    certificate = getattr(certificate, "certificate", certificate)
    unit = _UNITS[certificate["privacy_unit"]]
    change = _CHANGES[certificate["neighboring_relation"]]
    epsilon = certificate["epsilon"]
    delta = certificate["delta"]
    return (
        f"What was released is ({epsilon:g}, {delta:g})-differentially private: whoever sees it could hardly tell had "
        f"{unit} {change}. Whatever they believed before, their odds on that change by a factor of at most "
        f"e^{epsilon:g} = {_factor(epsilon)}, except with a probability of about {delta:g}. "
        f"{_spent(certificate)} The promise rests on {len(certificate['assumptions'])} assumptions that no program can "
        f"check: {' '.join(certificate['assumptions'])}"
    )


def _factor(epsilon: float) -> str:
    """e^epsilon as a person reads it."""
    # Beyond an epsilon of 709 the exponential is no double; a factor of e^50 is already as good as none.
    return f"{math.exp(epsilon):.3g}" if epsilon <= 50 else "more than 10^21"


def _spent(certificate: dict[str, Any]) -> str:
    """How often the data was used."""
    draws = len(certificate["budget"])
    noise = "exact discrete Gaussian noise" if certificate["hardened"] else "Gaussian noise"
    count = f"{certificate['num_units']:,}"
    sums = "sum" if draws == 1 else "sums"
    return f"The data of {count} units was used in {draws} noisy {sums}, each with {noise}."
