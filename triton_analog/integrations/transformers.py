"""For Hugging Face's transformers: a callback for its Trainer, and analog models from what ``save_pretrained`` wrote."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from triton_analog.optim import AnalogOptimizer, Attachment, attach
from triton_analog.restore import restore_analog

PATIENCE = 20
"""Steps that a trainer may count before its optimizer takes one: a gradient scaler skips some while it looks for its scale."""


class AnalogCallback(TrainerCallback):
    """``Trainer(..., callbacks=[AnalogCallback()])``: the trainer's optimizer clips analog weights after each of its steps.

    What :func:`triton_analog.optim.attach` does, for the time of a training. An :class:`AnalogOptimizer` that was handed to
    the trainer is left as it is.

    Raises:
        RuntimeError: the trainer counts steps, but its optimizer takes none that could be followed by a clip.
        TypeError, ValueError: at the start of the training, as :func:`attach` does: the model has no analog layers, or the
            optimizer steps others than the model's weights, as DeepSpeed's and other sharding ones do.
    """

    def __init__(self) -> None:
        self._attachment: Attachment | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs.get("optimizer")
        inner: Any = optimizer
        while getattr(inner, "optimizer", None) is not None:
            inner = inner.optimizer
        if not isinstance(inner, AnalogOptimizer):
            self._attachment = attach(kwargs["model"], optimizer)
            self._first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._attachment is not None and self._attachment.steps == 0:
            counted = state.global_step - self._first_step
            if counted >= PATIENCE:
                raise RuntimeError(
                    f"the trainer counted {counted} steps, but the optimizer that AnalogCallback clips after took none: "
                    "something else updates the weights, and they would never be clipped"
                )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None


def from_pretrained(model_class: Any, directory: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """The analog model that ``model.save_pretrained(directory)`` saved, in evaluation mode, with configs and ranges.

    Args:
        model_class: The digital class that was converted, such as ``LlamaForCausalLM``, or one of the ``AutoModel`` classes.
        directory: A folder, or a name on the Hub.
        dtype: Of the model; default the saved one.

    Raises:
        OSError: no safetensors there.
        ConfigError, RuntimeError, ValueError: as :func:`triton_analog.restore_analog`.
    """
    config = AutoConfig.from_pretrained(directory)
    digital: nn.Module = model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)
    state = _read(directory)
    wanted = dtype or next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    model: Any = restore_analog(digital.to(wanted), state, inplace=True)
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def _read(directory: str | Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, or of all that an index names."""
    index = cached_file(str(directory), SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        files = {SAFE_WEIGHTS_NAME}
    else:
        files = set(json.loads(Path(index).read_text())["weight_map"].values())
    state: dict[str, Tensor] = {}
    for name in sorted(files):
        state |= safetensors.torch.load_file(str(cached_file(str(directory), name)))
    return state
