"""From a run to what devices need: bundles (`bundles`), proof that they compute the same (`parity`), and packets (`packets`)."""
