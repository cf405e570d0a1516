"""Small public-to-private tasks outside the arena's grid, from mild to hopeless shifts: PhysioNet, digits, tables.

What happens where nothing was tuned for. Each takes a pretrained model and changes what its private and test records
look like:

    physionet_moved      half the features moved by 1.5 of their public spread
    physionet_flipped    the signs of three in ten features turned
    physionet_inverted   survivors labelled as deaths and deaths as survivors
    digits_noisy         noise of a third of the grey scale on scikit-learn's 8 x 8 digits
    digits_turned        the digits turned by 30 degrees
    digits_transposed    rows and columns exchanged
    table_changed        made-up table of 20 features; six coefficients of the outcome are others
    table_inverted       the same, all coefficients turned around

Networks are trained on the 2,000 public rows of the made-up tables until little loss is left, where no public quadratic
is of much use.
"""

import pathlib

import numpy as np
from scipy.ndimage import rotate
from sklearn.datasets import load_digits

from experiments import physionet
from experiments.data import Records, Split, select

_DIGITS_PUBLIC, _DIGITS_PRIVATE = 500, 700
_TABLE_PUBLIC, _TABLE_PRIVATE, _TABLE_ROWS, _TABLE_FEATURES = 2000, 4000, 9000, 20


def changed_physionet(kind: str, data_dir: pathlib.Path, cache_dir: pathlib.Path) -> Split:
    """PhysioNet by ICU with private and test records changed: `"moved"`, `"flipped"` or `"inverted"`."""
    split = physionet.by_icu(data_dir, cache_dir)
    num_features = split.public["x"].shape[1]
    order = np.random.default_rng(7).permutation(num_features)

    def change(records: Records) -> Records:
        x, label = records["x"].copy(), records["label"]
        if kind == "moved":
            x[:, order[: num_features // 2]] += 1.5
        elif kind == "flipped":
            x[:, order[: 3 * num_features // 10]] *= -1
        else:
            label = 1 - label
        return records | {"x": x, "label": label}

    return Split(split.public, change(split.private), change(split.test), f"{split.description}; private: {kind}")


def changed_digits(kind: str, *_: pathlib.Path) -> Split:
    """scikit-learn's digits with private and test images changed: `"noisy"`, `"turned"` or `"transposed"`; no files."""
    images, labels = load_digits(return_X_y=True)
    x = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(x))
    if kind == "noisy":
        other = x + 0.3 * rng.normal(size=x.shape)
    elif kind == "turned":
        other = rotate(x, 30, axes=(1, 2), reshape=False, order=1)
    else:
        other = x.transpose(0, 2, 1)
    changed = {"x": other.astype(np.float32), "label": labels.astype(np.int32)}
    private = _DIGITS_PUBLIC + _DIGITS_PRIVATE
    return Split(
        select(changed | {"x": x}, order[:_DIGITS_PUBLIC]),
        select(changed, order[_DIGITS_PUBLIC:private]),
        select(changed, order[private:]),
        f"scikit-learn's digits; private: {kind}",
    )


def changed_table(kind: str, *_: pathlib.Path) -> Split:
    """A made-up table whose outcome follows other coefficients in private: `"changed"` or `"inverted"`; no files."""
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(_TABLE_FEATURES, _TABLE_FEATURES)) / np.sqrt(_TABLE_FEATURES)
    x = rng.normal(size=(_TABLE_ROWS, _TABLE_FEATURES)) @ mixing + 0.3 * rng.normal(size=(_TABLE_ROWS, _TABLE_FEATURES))
    public = rng.normal(size=_TABLE_FEATURES)
    private = -public if kind == "inverted" else np.concatenate([rng.normal(size=6), public[6:]])
    is_public = np.arange(_TABLE_ROWS) < _TABLE_PUBLIC
    score = np.where(is_public, x @ public, x @ private) + 0.8 * np.sin(2 * x[:, 0]) * x[:, 1]
    label = score + 0.5 * rng.logistic(size=_TABLE_ROWS) > 0
    records = {"x": x.astype(np.float32), "label": label.astype(np.int32)}
    parts = np.split(np.arange(_TABLE_ROWS), [_TABLE_PUBLIC, _TABLE_PUBLIC + _TABLE_PRIVATE])
    return Split(*(select(records, part) for part in parts), f"a made-up table; coefficients {kind} in private")
