"""The file that `evaluate.load` is given: it copies a file, imports the copy and takes the metric class it finds there.

    evaluate.load(trl_tract.evaluation.evaluate_metric.__file__)

needs no network, no more than `trl_tract.evaluation.metrics.ScoreMetric()`, which is the same metric.
"""

from trl_tract.evaluation.metrics import ScoreMetric

__all__ = ["ScoreMetric"]
