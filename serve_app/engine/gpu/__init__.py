"""T5 in plain torch: on a GPU, and on a CPU for which the kernels have not been built."""
