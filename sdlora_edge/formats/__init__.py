"""Formats: canonical JSON, container, encodings, signatures, packets and bundles. numpy only."""
