"""How a state and a config are written by those who save them: Flax, and ``jax.export``."""
