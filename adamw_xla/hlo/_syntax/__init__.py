"""The text of an optimized HLO module, and what its words mean."""
