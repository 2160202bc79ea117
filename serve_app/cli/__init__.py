"""The `t5-serve` command."""
