"""Proof on the device itself: checks, and the processes that they start."""
