"""Patients with several stays: the guarantee covers all stays of a patient, and a ledger refuses a release too many.

    python -m experiments.examples.patients

The data are ICU stays of PhysioNet 2012 where $QEXP_DATA has them, else a made-up table. Run again, the ledger in --out
refuses the first release too: what was spent stays spent. Takes about a minute.
"""

import argparse
import json
import pathlib

import numpy as np

import qexp_jax
from experiments.benchmark import models, tasks
from experiments.data.splits import run_cli, select

# Enough for one release at epsilon 1, but not for two, which compose to epsilon 1.5.
BUDGET = {"epsilon": 1.2, "delta": 1e-5}
MOST_STAYS = 3  # of one patient that are used: a public number, chosen before anyone looks at the data


def pretrained():
    """A split of stays, a model, and its parameters, trained on the public stays."""
    has_physionet = (tasks.data_dir() / "physionet2012").is_dir()
    task = tasks.TASKS["physionet_icu" if has_physionet else "table_changed"]
    return tasks.pretrained_on(task, "mlp", tasks.data_dir(), tasks.cache_dir())


def made_up_patients(num_stays):
    """An id for each stay, of patients with 1 to 4 stays."""
    stays_of_patient = np.random.default_rng(0).integers(1, 5, size=num_stays)
    return np.repeat(np.arange(num_stays), stays_of_patient)[:num_stays]


def open_ledger(path):
    """One ledger a data set, made once and kept for as long as the data are used."""
    if path.exists():
        return qexp_jax.ledger.open(path)
    return qexp_jax.ledger.create(path, **BUDGET, privacy_unit="all records with one unit id")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-stays", type=int, default=4000)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("experiments/out/patients"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    ledger = open_ledger(args.out / "ledger.json")
    _, split, model, params = pretrained()
    stays = select(split.private, slice(args.num_stays))
    patients = made_up_patients(len(stays["label"]))
    private = qexp_jax.Dataset(records=stays, unit_ids=patients, max_records_per_unit=MOST_STAYS)
    print(f"{split.description}\nno patient is named there: stays are dealt to {patients[-1] + 1} made-up patients")
    print(f"AUROC {models.evaluate(model, params, split.test, 'auroc'):.3f} before, trained on public stays alone")

    for number in (1, 2):
        try:
            release = qexp_jax.fine_tune(
                qexp_jax.fresh_key(), model.loss_fn, params, public=split.public, private=private,
                epsilon=1.0, delta=1e-5, ledger=ledger,
            )  # fmt: skip
        except qexp_jax.BudgetExceeded as refusal:  # nothing private was read, and nothing was spent
            print(f"release {number} refused: {refusal}")
            continue
        path = args.out / "certificate.json"
        path.write_text(json.dumps(release.certificate, indent=2))
        print(f"AUROC {models.evaluate(model, release.params, split.test, 'auroc'):.3f} after private release {number}")
        # What whoever receives the model does with the certificate beside it.
        promise = json.loads(path.read_text())
        qexp_jax.verify(promise)
        print(f"{path}, verified: epsilon {promise['epsilon']:g}, delta {promise['delta']:g},")
        print(f"      for each of {promise['num_units']} units; a unit is {promise['privacy_unit']}")
    spent = qexp_jax.ledger.spent(ledger)
    print(f"ledger: {spent.releases} release, delta {spent.delta:.2g} at epsilon {BUDGET['epsilon']}")


if __name__ == "__main__":
    run_cli(main)
