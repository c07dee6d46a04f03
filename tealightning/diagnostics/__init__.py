"""Instruments: gradient fidelity of estimators, and tail checks of rewards."""
