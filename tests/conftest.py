"""What every test shares: deterministic hypothesis runs, and Keras on JAX."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it when it is imported

from hypothesis import HealthCheck, settings

settings.register_profile(
    "deterministic",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("deterministic")
