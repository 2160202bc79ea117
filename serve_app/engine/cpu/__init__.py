"""T5 on a CPU: oneDNN's matrix products and, for all the rest, the kernels of `engine.native`."""
