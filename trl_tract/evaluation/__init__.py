"""Agreement with gold scores: metrics, intervals, calibration, the report."""
