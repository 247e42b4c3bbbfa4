"""GPUs: StableHLO that XLA merges, or one Triton-dialect kernel for the whole tree."""
