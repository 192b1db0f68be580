"""A run's report: its numbers as one HTML page."""
