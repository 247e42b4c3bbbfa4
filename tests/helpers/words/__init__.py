"""The 16-bit state word in NumPy, from its description: it shares no code with the product.

Codes are found by looking a number up in the table of all values that can be stored; nothing
here is done on a pattern that the description does not call one. Words and 16-bit params are
bfloat16 arrays, ``m``, ``v`` and masters float32 ones, random words uint32 ones.
"""

from .masters import join as join
from .masters import round_to_bfloat16 as round_to_bfloat16
from .masters import split as split
from .noise import noise_of_param as noise_of_param
from .noise import noises as noises
from .noise import random_bits as random_bits
from .noise import with_random_bits as with_random_bits
from .scales import Scale as Scale
from .scales import U as U
from .scales import V as V
from .steps import Loaded as Loaded
from .steps import Stored as Stored
from .steps import loaded as loaded
from .steps import stored as stored
from .word import decode as decode
from .word import encode as encode
from .word import legal as legal
from .word import unit as unit
