"""Self-hosted T5 summarization on Ray Serve."""

__version__ = "0.1.0"
