"""The fleet: what is published, who takes it when, and what devices report."""
