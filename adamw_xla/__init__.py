"""AdamW for JAX: one optimizer step, seen by the compiler as one operation."""

from adamw_xla import hlo as hlo
from adamw_xla import lowering as lowering
from adamw_xla import reference as reference
from adamw_xla import sharding as sharding
from adamw_xla._adapt import adapt_state as adapt_state
from adamw_xla._config import AdamW as AdamW
from adamw_xla._formats import master_params as master_params
from adamw_xla._formats import pack_state as pack_state
from adamw_xla._formats import unpack_state as unpack_state
from adamw_xla._info.step_info import LeafNorms as LeafNorms
from adamw_xla._info.step_info import StepInfo as StepInfo
from adamw_xla._inside.grouped import describe_groups as describe_groups
from adamw_xla._rules.groups import Group as Group
from adamw_xla._rules.spikes import SpikeRule as SpikeRule
from adamw_xla._state import AdamWState as AdamWState
from adamw_xla._state import adamw_init as adamw_init
from adamw_xla._step import adamw_finalize as adamw_finalize
from adamw_xla._step import adamw_step as adamw_step
from adamw_xla._step import scale_loss as scale_loss
from adamw_xla_lowering import native_available as native_available

__version__ = "0.1.0"
