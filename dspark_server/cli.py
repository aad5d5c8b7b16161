"""The command line: serve, pull, conformance, generate."""
