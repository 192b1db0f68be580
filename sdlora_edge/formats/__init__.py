"""What is signed and shipped: canonical JSON, the container, encodings, signatures, packets, control packets, bundles. numpy only."""
