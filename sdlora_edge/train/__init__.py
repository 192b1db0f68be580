"""Training on the workstation: pictures, task streams, the trainer, metrics, and the run on disk. Needs torch."""
