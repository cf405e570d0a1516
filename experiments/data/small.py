"""Small public-to-private tasks beside the benchmark's grid, no shift to a hopeless one: PhysioNet, digits, tables.

What happens where nothing was tuned for. Most take a pretrained model and change what its private and test records look
like:

    physionet_moved      half the features moved by 1.5 of their public spread
    physionet_flipped    the signs of three in ten features turned
    physionet_inverted   survivors labelled as deaths and deaths as survivors
    digits_noisy         noise of a third of the grey scale on scikit-learn's 8 x 8 digits
    digits_turned        the digits turned by 30 degrees
    digits_transposed    rows and columns exchanged
    table_changed        made-up table of 20 features; six coefficients of the outcome are others
    table_inverted       the same, all coefficients turned around

Networks are trained on the 2,000 public rows of these made-up tables until little loss is left, where no public
quadratic is of much use.

Two have no shift. Their public, private and test records are random parts of one table of mostly one-hot columns, many
of them rare:

    table_rare           made-up table of 30,000 public rows: ten variables in 85 one-hot columns, and five numbers; 9 %
                         have the outcome, which depends weakly on them
    physionet_rare       stays of any ICU, 8,000 of them public: fifths of the twelve most measured series and of age,
                         ICU type, sex, and how often six seldom tests were made

Three columns of `table_rare` and two of `physionet_rare` are 0 in every public record and 1 in some private ones: there
public records have no curvature and private ones a gradient. One seed of `table_rare` in a hundred leaves three. Each
seed is the first that leaves so many and where no common column's public and private means are three standard errors
apart.
"""

import pathlib

import numpy as np
from scipy.ndimage import rotate
from sklearn.datasets import load_digits

from experiments.data import physionet
from experiments.data.physionet_files import ICU_TYPES
from experiments.data.splits import Records, Split, select

_DIGITS_PUBLIC, _DIGITS_PRIVATE = 500, 700
_TABLE_PUBLIC, _TABLE_PRIVATE, _TABLE_ROWS, _TABLE_FEATURES = 2000, 4000, 9000, 20

_RARE_PUBLIC, _RARE_PRIVATE, _RARE_ROWS, _RARE_NUMBERS = 30_000, 2000, 42_000, 5
# Common and rare levels of each variable of `table_rare`.
_RARE_LEVELS = ((2, 0), (3, 0), (4, 0), (5, 0), (6, 0), (8, 0), (6, 6), (7, 7), (8, 7), (8, 8))
_MOST_RARE, _LEAST_RARE = 3e-5, 1e-4  # shares of rare levels: 1 to 3 public rows
_SCORE_SPREAD = 0.6  # a perfect linear model then has an AUROC of .66
_SCORE_MEAN = -2.47  # 9 % positives

_NUM_BINNED, _NUM_BINS = 12, 5
# The most often that a seldom test was made in 48 hours, known beforehand like a code book.
_SELDOM = {"Albumin": 10, "ALP": 12, "Bilirubin": 13, "Cholesterol": 3, "TroponinI": 7, "TroponinT": 8}

_TABLE_SEED, _STAYS_SEED = 23, 2


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


def rare_table(*_: pathlib.Path) -> Split:
    """A made-up table without shift: one-hot columns, some of them rare, and a rare outcome; no files."""
    rng = np.random.default_rng(_TABLE_SEED)
    variables = [_draw_variable(rng, common, rare) for common, rare in _RARE_LEVELS]
    numbers = rng.normal(size=(_RARE_ROWS, _RARE_NUMBERS))
    x = np.concatenate([*variables, numbers], axis=1).astype(np.float32)
    effects = x @ rng.normal(size=x.shape[1])
    score = _SCORE_MEAN + _SCORE_SPREAD * (effects - effects.mean()) / effects.std()
    label = score + rng.logistic(size=_RARE_ROWS) > 0
    records = {"x": x, "label": label.astype(np.int32)}
    parts = np.split(np.arange(_RARE_ROWS), [_RARE_PUBLIC, _RARE_PUBLIC + _RARE_PRIVATE])
    return Split(*(select(records, part) for part in parts), "a made-up table with rare levels, without shift")


def _draw_variable(rng: np.random.Generator, common: int, rare: int) -> np.ndarray:
    """One-hot (rows, common + rare); common levels fall to a fifth of the first, rare ones to `_MOST_RARE`."""
    rare_shares = np.geomspace(_LEAST_RARE, _MOST_RARE, rare)
    weights = np.geomspace(1, 1 / 5, common)
    common_shares = (1 - rare_shares.sum()) * weights / weights.sum()
    shares = np.concatenate([common_shares, rare_shares])
    return _one_hot(rng.choice(common + rare, size=_RARE_ROWS, p=shares), common + rare)


def _one_hot(codes: np.ndarray, num_levels: int) -> np.ndarray:
    """(n, num_levels) of 0 and 1 from codes (n,) in {0, ..., num_levels - 1}."""
    return (codes[:, None] == np.arange(num_levels)).astype(np.float32)


def rare_physionet(data_dir: pathlib.Path, cache_dir: pathlib.Path) -> Split:
    """Random parts of all stays of PhysioNet as one-hot columns; fifths and their series are of the public part."""
    sets, notice = physionet.stays_of_known_icu(data_dir, cache_dir)
    stays = {name: np.concatenate([table[name] for table in sets]) for name in ("x", "label", "icu")}
    num_stays = len(stays["label"])
    order = np.random.default_rng(_STAYS_SEED).permutation(num_stays)
    parts = np.split(order, [2 * num_stays // 3, 5 * num_stays // 6])
    x = _stay_columns(stays["x"], stays["icu"], parts[0])
    records = {"x": x, "label": stays["label"]}
    description = "PhysioNet 2012 (MIMIC-II): random parts of all stays as one-hot columns, without shift"
    return Split(*(select(records, part) for part in parts), f"{description}; in-hospital death{notice}")


def _stay_columns(raw: np.ndarray, icu: np.ndarray, public: np.ndarray) -> np.ndarray:
    """One-hot columns of all stays from raw features (n, p); `public` are the stays that set series and bins."""
    means, counts = _means_and_counts(raw)
    measured = np.mean(counts[public] > 0, axis=0)
    most_measured = np.argsort(-measured, kind="stable")[:_NUM_BINNED]
    age = raw[:, physionet.STATIC.index("Age")]
    sex = raw[:, physionet.STATIC.index("Gender")]
    columns = [_bins(values, public) for values in (*means[:, most_measured].T, age)]
    columns.append(_one_hot(icu - 1, len(ICU_TYPES)))
    columns.append(_one_hot(np.where(np.isnan(sex), 2, sex), 3))
    for test, most in _SELDOM.items():
        times = counts[:, physionet.SERIES.index(test)]
        columns.append(_one_hot(np.minimum(times, most), most + 1))
    return np.concatenate(columns, axis=1)


def _means_and_counts(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean, NaN where not measured, and number of measurements of each series, both (n, series)."""
    summaries = raw[:, len(physionet.STATIC) :].reshape(len(raw), len(physionet.SERIES), 5)
    return summaries[:, :, 1], summaries[:, :, 4]


def _bins(values: np.ndarray, public: np.ndarray) -> np.ndarray:
    """One-hot of the public quantile bin, and a last column where the value is missing."""
    edges = np.nanquantile(values[public], np.arange(1, _NUM_BINS) / _NUM_BINS)
    bins = np.searchsorted(edges, values, side="right")
    return _one_hot(np.where(np.isnan(values), _NUM_BINS, bins), _NUM_BINS + 1)
