"""Intervals from resampled items, and the items in the form that resampling needs."""
