"""WIDERFace evaluation in NumPy: AP, paired bootstrap, breakdowns. ``python -m widerface_evaluate PRED GT``."""

from .ap import Curve, Matches, evaluate, evaluate_matches, match, rescore
from .bootstrap import paired_bootstrap, resampled_deltas
from .breakdown import breakdown, landmark_error, worst_cases
from .errors import EvaluationError, image_key
from .ground_truth import GroundTruth, from_label_set, load_ground_truth, load_labels, load_list
from .predictions import load_predictions, write_predictions

__all__ = [
    "Curve",
    "EvaluationError",
    "GroundTruth",
    "Matches",
    "breakdown",
    "evaluate",
    "evaluate_matches",
    "from_label_set",
    "image_key",
    "landmark_error",
    "load_ground_truth",
    "load_labels",
    "load_list",
    "load_predictions",
    "match",
    "paired_bootstrap",
    "resampled_deltas",
    "rescore",
    "worst_cases",
    "write_predictions",
]
