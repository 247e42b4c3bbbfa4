"""``optax.adamw`` as one operation: a drop-in for optax and for all that speaks it.

``adamw`` takes the arguments of ``optax.adamw`` and returns a transformation for
``optax.chain``, Flax, Equinox and the like. Beside ``optax.apply_updates`` in one
``jax.jit`` it compiles to what ``adamw_xla.adamw_step`` does. ``from_optax_state`` and
``to_optax_state`` move a running training over.
"""

from adamw_xla._check import installed

installed.require("optax", "optax>=0.2.5", "adamw_xla.optax")

# Behind the check, since they import optax.
from adamw_xla.optax._state import AdamWOptState as AdamWOptState  # noqa: E402
from adamw_xla.optax._state import from_optax_state as from_optax_state  # noqa: E402
from adamw_xla.optax._state import to_optax_state as to_optax_state  # noqa: E402
from adamw_xla.optax._transformation import adamw as adamw  # noqa: E402
from adamw_xla.optax._transformation import clip_by_global_norm as clip_by_global_norm  # noqa: E402
