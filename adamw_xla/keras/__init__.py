"""``keras.optimizers.AdamW`` on the JAX backend, with one operation per step.

To use it, change the import:

>>> from adamw_xla.keras import AdamW
>>> optimizer = AdamW(learning_rate=0.001)

``KERAS_BACKEND=jax`` must be set before Keras is imported.
"""

from adamw_xla.keras._optimizer import AdamW as AdamW
