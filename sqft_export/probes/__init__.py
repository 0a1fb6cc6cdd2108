"""The self-test of a deployment: ``probe.json``, and its comparison with the installed runtime."""
