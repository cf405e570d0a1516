"""Plausible values of clinical measurements: one table for every loader. A value outside its bounds counts as missing.

Two published tables say beyond which value a measurement is an error: `resources/variable_ranges.csv` of Harutyunyan
et al. (arXiv:1703.07771, github.com/YerevaNN/mimic3-benchmarks), which MIMIC-Extract (arXiv:1907.08322) took over, sets
a value missing outside "OUTLIER LOW" to "OUTLIER HIGH". `OUTLIERS` quotes these; `BOUNDS` are never wider. They are
narrower where the published ones let a value pass that no living adult has: a heart rate or a pressure of 0, a pH of
10, a height of 2 cm (metres), 250 breaths a minute. What the published table lacks is bounded by our own judgement of
what a laboratory could report; these rows are those absent from `OUTLIERS`.
"""

import types
from collections.abc import Mapping
from typing import NamedTuple


class Bounds(NamedTuple):
    """The least and the greatest plausible value, both included, in `unit`."""

    low: float
    high: float
    unit: str


BOUNDS: Mapping[str, Bounds] = types.MappingProxyType(
    {
        # On admission.
        "age": Bounds(15, 120, "years"),
        "gender": Bounds(0, 1, "0 female, 1 male"),
        "height": Bounds(100, 240, "cm"),
        "weight": Bounds(25, 250, "kg"),
        "icu_type": Bounds(1, 4, "code"),
        # At the bedside.
        "heart_rate": Bounds(10, 300, "1/min"),
        "systolic_bp": Bounds(30, 300, "mmHg"),
        "diastolic_bp": Bounds(10, 200, "mmHg"),
        "mean_bp": Bounds(15, 250, "mmHg"),
        "respiratory_rate": Bounds(1, 80, "1/min"),
        "temperature": Bounds(25, 45, "degrees C"),
        "spo2": Bounds(30, 100, "%"),
        "fio2": Bounds(20, 100, "%"),
        "fio2_fraction": Bounds(0.2, 1, "1"),
        "gcs_eye": Bounds(1, 4, "points"),
        "gcs_verbal": Bounds(1, 5, "points"),
        "gcs_motor": Bounds(1, 6, "points"),
        "gcs": Bounds(3, 15, "points"),
        "mechanical_ventilation": Bounds(0, 1, "0 no, 1 yes"),
        "urine": Bounds(0, 2445, "mL"),
        # From the laboratory.
        "glucose": Bounds(10, 2000, "mg/dL"),
        "creatinine": Bounds(0.05, 40, "mg/dL"),
        "urea_nitrogen": Bounds(1, 275, "mg/dL"),
        "sodium": Bounds(90, 200, "mmol/L"),
        "potassium": Bounds(1, 12, "mmol/L"),
        "chloride": Bounds(50, 175, "mmol/L"),
        "bicarbonate": Bounds(2, 66, "mmol/L"),
        "anion_gap": Bounds(0, 55, "mmol/L"),
        "lactate": Bounds(0.1, 33, "mmol/L"),
        "white_cells": Bounds(0, 1000, "1000/uL"),
        "hemoglobin": Bounds(1.5, 25, "g/dL"),
        "hematocrit": Bounds(5, 75, "%"),
        "platelets": Bounds(1, 2200, "1000/uL"),
        "bilirubin": Bounds(0.05, 66, "mg/dL"),
        "alkaline_phosphatase": Bounds(1, 4000, "IU/L"),
        "alanine_transaminase": Bounds(1, 11000, "IU/L"),
        "aspartate_transaminase": Bounds(1, 22000, "IU/L"),
        "cholesterol": Bounds(20, 660, "mg/dL"),
        "troponin_i": Bounds(0, 575, "ug/L"),
        "troponin_t": Bounds(0, 24, "ug/L"),
        "inr": Bounds(0.4, 30, "1"),
        "ptt": Bounds(10, 150, "s"),
        "ph": Bounds(6.5, 8, "1"),
        "po2": Bounds(10, 750, "mmHg"),
        "pco2": Bounds(5, 200, "mmHg"),
        "albumin": Bounds(0.5, 8, "g/dL"),
        "calcium": Bounds(2, 20, "mg/dL"),
        "free_calcium": Bounds(0.2, 4, "mmol/L"),
        "magnesium": Bounds(0.2, 15, "mg/dL"),
        "phosphate": Bounds(0.2, 22, "mg/dL"),
    }
)

# As published; FiO2 in per cent, too, where the publication has the fraction.
OUTLIERS: Mapping[str, tuple[float, float]] = types.MappingProxyType(
    {
        "height": (0, 275),
        "weight": (0, 250),
        "heart_rate": (0, 390),
        "systolic_bp": (0, 375),
        "diastolic_bp": (0, 375),
        "mean_bp": (0, 375),
        "respiratory_rate": (0, 330),
        "temperature": (14.2, 47),
        "spo2": (0, 150),
        "fio2": (20, 110),
        "fio2_fraction": (0.2, 1.1),
        "gcs_eye": (1, 4),
        "gcs_verbal": (1, 5),
        "gcs_motor": (1, 6),
        "gcs": (3, 15),
        "urine": (0, 2445),
        "glucose": (0, 2200),
        "creatinine": (0, 66),
        "urea_nitrogen": (0, 275),
        "sodium": (0, 250),
        "potassium": (0, 15),
        "chloride": (0, 200),
        "bicarbonate": (0, 66),
        "anion_gap": (0, 55),
        "lactate": (0, 33),
        "white_cells": (0, 1100),
        "hemoglobin": (0, 30),
        "hematocrit": (0, 100),
        "platelets": (0, 2200),
        "bilirubin": (0, 66),
        "alkaline_phosphatase": (0, 4000),
        "alanine_transaminase": (0, 11000),
        "aspartate_transaminase": (0, 22000),
        "cholesterol": (0, 660),
        "troponin_i": (0, 575),
        "troponin_t": (0, 24),
        "ptt": (0, 150),
        "ph": (6.3, 10),
        "po2": (0, 770),
        "pco2": (0, 220),
        "albumin": (0, 60),
        "magnesium": (0, 22),
        "phosphate": (0, 22),
    }
)

# PhysioNet 2012 has FiO2 as a fraction, and arterial and cuff pressures as parameters of their own.
_PHYSIONET_NAMES = {
    "Age": "age",
    "Gender": "gender",
    "Height": "height",
    "ICUType": "icu_type",
    "Weight": "weight",
    "Albumin": "albumin",
    "ALP": "alkaline_phosphatase",
    "ALT": "alanine_transaminase",
    "AST": "aspartate_transaminase",
    "Bilirubin": "bilirubin",
    "BUN": "urea_nitrogen",
    "Cholesterol": "cholesterol",
    "Creatinine": "creatinine",
    "DiasABP": "diastolic_bp",
    "FiO2": "fio2_fraction",
    "GCS": "gcs",
    "Glucose": "glucose",
    "HCO3": "bicarbonate",
    "HCT": "hematocrit",
    "HR": "heart_rate",
    "K": "potassium",
    "Lactate": "lactate",
    "MAP": "mean_bp",
    "MechVent": "mechanical_ventilation",
    "Mg": "magnesium",
    "Na": "sodium",
    "NIDiasABP": "diastolic_bp",
    "NIMAP": "mean_bp",
    "NISysABP": "systolic_bp",
    "PaCO2": "pco2",
    "PaO2": "po2",
    "pH": "ph",
    "Platelets": "platelets",
    "RespRate": "respiratory_rate",
    "SaO2": "spo2",
    "SysABP": "systolic_bp",
    "Temp": "temperature",
    "TroponinI": "troponin_i",
    "TroponinT": "troponin_t",
    "Urine": "urine",
    "WBC": "white_cells",
}
PHYSIONET_BOUNDS: Mapping[str, Bounds] = types.MappingProxyType(
    {parameter: BOUNDS[name] for parameter, name in _PHYSIONET_NAMES.items()}
)
