"""From a run to what devices need.

`bundles` exports a model, `parity` proves that it computes the same, and `packets` builds updates.
"""
