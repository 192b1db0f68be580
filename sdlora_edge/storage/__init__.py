"""Durable files and folders, and what is asked of a disk."""
