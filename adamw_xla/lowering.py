"""The compiler half, for those who build on it: see ``adamw_xla_lowering``."""

from adamw_xla_lowering import COMPOSITE_NAME as COMPOSITE_NAME
from adamw_xla_lowering import NUM_SLOTS as NUM_SLOTS
from adamw_xla_lowering import PARAM_DTYPES as PARAM_DTYPES
from adamw_xla_lowering import UPDATE_NAME as UPDATE_NAME
from adamw_xla_lowering import Implementation as Implementation
from adamw_xla_lowering import NativeUnavailableError as NativeUnavailableError
from adamw_xla_lowering import Slot as Slot
from adamw_xla_lowering import UpdateNotDifferentiableError as UpdateNotDifferentiableError
from adamw_xla_lowering import UpdateResult as UpdateResult
from adamw_xla_lowering import UpdateSpec as UpdateSpec
from adamw_xla_lowering import adamw_update as adamw_update
from adamw_xla_lowering import adamw_update_p as adamw_update_p
