"""The engine against its peers: `python -m bench.engine`. How it is measured: bench/README.md."""
