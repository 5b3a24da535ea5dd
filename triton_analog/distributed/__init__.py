"""Training on many processes: which ranks belong together, how they share a layer, and what a forward that is no training must
leave alone."""

from triton_analog.distributed.groups import set_parallel
from triton_analog.nn.ranks import start_up_paused

__all__ = ["AnalogColwise", "AnalogRowwise", "set_parallel", "start_up_paused"]


def __getattr__(name: str) -> object:
    """The styles import much of ``torch.distributed``, which those who have no use for them need not wait for."""
    if name in ("AnalogColwise", "AnalogRowwise"):
        import triton_analog.distributed.tensor_parallel as tensor_parallel

        return getattr(tensor_parallel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
