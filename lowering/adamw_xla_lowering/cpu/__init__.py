"""CPUs: calls of a compiled kernel."""
