"""A pytest plugin that puts ``adamw_xla.keras.AdamW`` in the stock class's place in Keras.

    KERAS_BACKEND=jax python -m pytest -p keras_plugin -c /dev/null --pyargs MODULE...

It must be loaded before Keras' test modules, which take the class by its name when they are
imported.
"""

import keras
from keras.src import api_export, optimizers
from keras.src.optimizers import adamw

from adamw_xla.keras import AdamW


def replace(stock: type, ours: type) -> None:
    """Puts ``ours`` wherever Keras looks for the class, by import, name or registration."""
    optimizers.ALL_OBJECTS.discard(stock)
    optimizers.ALL_OBJECTS.add(ours)
    optimizers.ALL_OBJECTS_DICT["adamw"] = ours
    for module in (adamw, optimizers, keras.optimizers):
        module.AdamW = ours
    api_export.register_internal_serializable("keras.optimizers.AdamW", ours)


replace(adamw.AdamW, AdamW)
