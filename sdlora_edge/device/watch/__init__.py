"""The watcher: applies packets as they arrive in a folder."""
