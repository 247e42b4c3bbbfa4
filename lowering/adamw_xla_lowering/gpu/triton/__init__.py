"""The kernels of GPUs in the Triton dialect: operations, and where programs find their work."""
