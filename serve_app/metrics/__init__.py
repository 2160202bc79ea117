"""Prometheus series of the service: which there are, and how they get to Ray's metrics port."""
