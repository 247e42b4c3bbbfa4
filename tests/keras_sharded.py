"""Keras' Distribution API on eight devices; ``test_sharding.py`` runs this in a process of its own.

By hand: ``XLA_FLAGS=--xla_force_host_platform_device_count=8 KERAS_BACKEND=jax python
tests/keras_sharded.py``.
"""
