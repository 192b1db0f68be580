"""From a run to what devices need: bundles (`onnx`), proof that they compute the same (`parity`), and packets (`packets`)."""
