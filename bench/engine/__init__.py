"""The engine against its peers: `python -m bench.engine`. How: docs/performance.md."""
