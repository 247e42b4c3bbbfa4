"""``keras.optimizers.AdamW`` on the JAX backend, with one operation per step.

To use it, change the import:

>>> from adamw_xla.keras import AdamW
>>> optimizer = AdamW(learning_rate=0.001)

``KERAS_BACKEND=jax`` must be set before Keras is imported.
"""

from adamw_xla._check import installed
from adamw_xla.keras import _check

installed.require("keras", "keras>=3.15", "adamw_xla.keras")
_check.chosen_backend()

# Behind the checks, since it imports Keras, which on its own fails in terms of TensorFlow.
from adamw_xla.keras._optimizer import AdamW as AdamW  # noqa: E402
