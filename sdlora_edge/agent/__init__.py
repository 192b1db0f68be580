"""The agent: one process on a device that follows updates, serves predictions, and reports."""
