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
    unit, change = _UNITS[certificate["privacy_unit"]], _CHANGES[certificate["neighboring_relation"]]
    epsilon, delta = certificate["epsilon"], certificate["delta"]
    return (
        f"What was released is ({epsilon:g}, {delta:g})-differentially private: whoever sees it could hardly tell had "
        f"{unit} {change}. Whatever they believed before, their odds on that change by a factor of at most "
        f"e^{epsilon:g} = {_factor(epsilon)}, except with a probability of about {delta:g}. "
        f"{_spent(certificate)} The promise rests on {len(certificate['assumptions'])} assumptions that no program can "
        f"check: {' '.join(certificate['assumptions'])}"
    )


def _factor(epsilon):
    """e^epsilon as a person reads it."""
    return f"{math.exp(min(epsilon, 50)):.3g}"


def _spent(certificate):
    """How often the data was used."""
    draws = len(certificate["budget"])
    noise = "exact discrete Gaussian noise" if certificate["hardened"] else "Gaussian noise"
    count = f"{certificate['num_units']:,}"
    return f"The data of {count} units was used in {draws} noisy {'sum' if draws == 1 else 'sums'}, each with {noise}."
