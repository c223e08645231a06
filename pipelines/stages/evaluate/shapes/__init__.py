"""The demo's metric: which coloured shape a generated picture shows, read back from its pixels."""
