"""What the MIMIC loader read, what it dropped and why: printed, and as mimic_report.json beside the results.

    python -m experiments.data.mimic_report --data-dir mimiciii/1.4 --out experiments/out/mimic

The numbers are exact, hence **not private**: they are for whoever holds the data.
"""

import argparse
import collections
import json
import pathlib
from typing import Any

import numpy as np

from experiments.benchmark import tasks
from experiments.data import mimic
from experiments.data.splits import Records, atomic, run_cli


def describe(directory: pathlib.Path, cache_dir: pathlib.Path, *, progress: bool = True) -> dict[str, Any]:
    """`mimic.report`, and of the cohort the patients with each outcome, by unit and era, and the missing values.

    Returns:
      What `mimic.report` does, with "outcomes", "units" and "eras" (numbers of patients) and "missing": for each
      variable the share of patients without a value.
    """
    table = mimic.cohort_table(directory, cache_dir, progress=progress)
    outcomes = {name: int(table[name].sum()) for name in ("mortality", "long_stay")}
    groups = {f"{name}s": dict(sorted(collections.Counter(map(str, table[name])).items())) for name in ("unit", "era")}
    found = mimic.report(directory, cache_dir, progress=progress)
    return found | {"outcomes": outcomes} | groups | {"missing": _missing(table)}


def _missing(table: Records):
    shares = {name: np.isnan(table[name]).mean() for name in ("age", "female")}
    shares |= {variable.name: (table[f"{variable.name}_count"] == 0).mean() for variable in mimic.VARIABLES}
    return {name: round(float(share), 4) for name, share in shares.items()}


def lines(found: dict[str, Any]) -> list[str]:
    """The same as text."""
    stays = sum(found["stays"].values())
    text = [f"{found['database']}: {found['patients']} of {stays} stays in the cohort, one a patient"]
    for name, table in found["tables"].items():
        text.append(f"{name}: {table['rows']} rows of {table['file']}")
        text += [f"  {column}: {_states(cells)}" for column, cells in table["cells"].items() if _not_read(cells)]
    text.append(f"stays: {_counts(found['stays'])}")
    text += [f"rows of {name}: {_counts(fates)}" for name, fates in found["events"].items()]
    text += [f"patients by {name}: {_counts(found[f'{name}s'])}" for name in ("unit", "era")]
    text.append(f"patients with the outcome: {_counts(found['outcomes'])}")
    text.append("share of patients without a value:")
    return text + [f"  {name}: {share:.1%}" for name, share in found["missing"].items()]


def _not_read(cells):
    return {state: number for state, number in cells.items() if number and state != "read"}


def _states(cells):
    return ", ".join(f"{number} {state}" for state, number in _not_read(cells).items())


def _counts(numbers):
    return "; ".join(f"{number} {name or 'unknown'}" for name, number in numbers.items()) or "none"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True, help="of MIMIC-III or MIMIC-IV")
    parser.add_argument("--cache-dir", type=pathlib.Path, default=tasks.cache_dir(), help="default: $QEXP_CACHE")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of mimic_report.json")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    found = describe(args.data_dir, args.cache_dir)
    print(*lines(found), sep="\n")
    with atomic(args.out / "mimic_report.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_cli(main)
