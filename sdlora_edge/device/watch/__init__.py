"""The watcher: a folder of packets is applied as they arrive."""
