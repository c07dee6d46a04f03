"""Instruments: how faithful an estimator's gradient is, and whether a reward has the tail that it assumes."""
