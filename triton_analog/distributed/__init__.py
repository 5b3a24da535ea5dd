"""Training on many processes: which ranks belong together, and what a forward that is no training must leave alone."""

from triton_analog.distributed.groups import set_parallel
from triton_analog.nn.ranks import start_up_paused

__all__ = ["set_parallel", "start_up_paused"]
