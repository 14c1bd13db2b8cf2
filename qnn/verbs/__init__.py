"""What users call on a model."""

from qnn.verbs.bench import Bench, bench
from qnn.verbs.calibrate import calibrate
from qnn.verbs.compare import Comparison, compare, sqnr
from qnn.verbs.convert import convert
from qnn.verbs.correct_bias import correct_bias
from qnn.verbs.fuse import fuse
from qnn.verbs.prepare import prepare
from qnn.verbs.sensitivity import Sensitivity, sensitivity
from qnn.verbs.smooth import smooth
from qnn.verbs.summary import Summary, summary

__all__ = [
    "Bench",
    "Comparison",
    "Sensitivity",
    "Summary",
    "bench",
    "calibrate",
    "compare",
    "convert",
    "correct_bias",
    "fuse",
    "prepare",
    "sensitivity",
    "smooth",
    "sqnr",
    "summary",
]
