"""T5 engines. Nothing in this package knows of Ray or HTTP."""
