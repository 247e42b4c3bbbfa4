"""AdamW for JAX."""
