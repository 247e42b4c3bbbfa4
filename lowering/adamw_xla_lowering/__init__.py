"""The compiler half of adamw_xla: ``adamw_update_p``, its rules and its lowerings."""

from ._jax_private import manual_axes as manual_axes
from ._jax_private import types_say_varying as types_say_varying
from ._jax_private import varying_axes as varying_axes
from .contract import COMPOSITE_NAME as COMPOSITE_NAME
from .contract import NORM_NAME as NORM_NAME
from .contract import NUM_SLOTS as NUM_SLOTS
from .contract import PARAM_DTYPES as PARAM_DTYPES
from .contract import UPDATE_NAME as UPDATE_NAME
from .contract import Implementation as Implementation
from .contract import Slot as Slot
from .contract import UpdateSpec as UpdateSpec
from .contract import check_implementation as check_implementation
from .contract import compute_dtype as compute_dtype
from .contract import dtype_names as dtype_names
from .contract import small_unit as small_unit
from .cpu.library import native_available as native_available
from .errors import NativeUnavailableError as NativeUnavailableError
from .norms import Squares as Squares
from .norms import adamw_sum_of_squares as adamw_sum_of_squares
from .primitive import UpdateResult as UpdateResult
from .primitive import adamw_update as adamw_update
from .primitive import adamw_update_p as adamw_update_p
from .rules.autodiff import UpdateNotDifferentiableError as UpdateNotDifferentiableError
from .rules.placing import shard_alike as shard_alike
from .rules.placing import shard_apart as shard_apart
