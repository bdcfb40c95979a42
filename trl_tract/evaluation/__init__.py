"""How far scores agree with gold scores: metrics, intervals, calibration, the report."""
