"""Training on the workstation: images, task streams, the trainer, metrics, and the run on disk. Needs torch."""
