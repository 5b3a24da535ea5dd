"""For Hugging Face's transformers: callbacks for its Trainer, analog models from what ``save_pretrained`` wrote, other
vocabularies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from triton_analog.analysis import Analysis, analyze
from triton_analog.integrations.checkpoint_names import as_in_model
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.outside import complaint_of_shape
from triton_analog.optim import Attachment, attach
from triton_analog.restore import restore_analog
from triton_analog.samples import analog_layers, check_batches


class AnalogCallback(TrainerCallback):
    """``Trainer(model, args, callbacks=[AnalogCallback()], ...)``: clips analog weights after each step of its optimizer.

    The same as :func:`triton_analog.optim.attach` from the beginning of the training to its end, with what is refused there;
    an ``AnalogOptimizer`` that the trainer was given clips once all the same. A step that ends without the work raises. The
    base may be frozen, with digital adapters that are trained: then there is only noise to draw.

    Args:
        master: As for :func:`~triton_analog.optim.attach`.
    """

    def __init__(self, master: Mapping[Tensor, Tensor] | None = None) -> None:
        self.master = master
        self.attachment: Attachment | None = None
        self._seen = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attachment = attach(kwargs["model"], kwargs["optimizer"], self.master)
        self._seen = self.attachment.steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.attachment is not None
        optimizer = kwargs["optimizer"]
        if self.attachment.steps == self._seen and not getattr(optimizer, "step_was_skipped", False):
            raise RuntimeError(
                f"the analog weights were not clipped after step {state.global_step}: {type(optimizer).__name__} has not called "
                "the step of the optimizer inside, or that runs no hooks of torch.optim.Optimizer. Train with another one "
                "(optim=, optimizers=), or without this callback and call model.clip_weights() after each step"
            )
        self._seen = self.attachment.steps

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.attachment is not None
        self.attachment.remove()


class AnalysisCallback(TrainerCallback):
    """Logs what the layers do on their tiles while a Trainer trains, so that TensorBoard and others show curves.

    ``trainer.add_callback(AnalysisCallback(trainer, batches, interval=500))``: after every ``interval`` steps, and after the
    last, :func:`triton_analog.analyze` runs on ``batches`` and the trainer logs ``analog/<layer>/snr_db``, ``.../clipped``,
    ``.../saturated``, ``.../kurtosis`` and ``.../range_ratio``. The training goes on as it would without: modes, input ranges
    and random numbers stay. It takes about three evaluations of the batches. Every process runs them, and the first one logs.

    Args:
        trainer: What logs. It has to be there already, as a callback has no way to it.
        batches: A list of batches or a ``DataLoader``, which is run through each time; see :func:`~triton_analog.analyze`.
            Tensors are moved to the device of the model.
        interval: Optimizer steps between two analyses, ``>= 1``.
        forward: As for :func:`~triton_analog.analyze`.

    Raises:
        TypeError: ``trainer`` cannot log, or ``batches`` can be run through only once.
        ValueError: ``interval`` is no number of steps, or ``batches`` is empty.

    ``analyses`` has what was found, by the number of the step.
    """

    def __init__(
        self,
        trainer: Any,
        batches: Iterable[Any],
        interval: int = 500,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        if not callable(getattr(trainer, "log", None)):
            raise TypeError(f"trainer: got {type(trainer).__name__}; the transformers.Trainer that is to log is needed")
        if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
            raise ValueError(f"interval: got {interval!r}; a number of steps >= 1 is needed")
        check_batches(batches)
        if isinstance(batches, Iterator):
            raise TypeError(
                f"batches: got a {type(batches).__name__}, which can be run through only once; give list(batches) or a DataLoader"
            )
        if isinstance(batches, Sized) and len(batches) == 0:
            raise ValueError("batches: none given; at least one is needed, such as [batch]")
        self.trainer, self.batches, self.interval, self.forward = trainer, batches, interval, forward
        self.analyses: dict[int, Analysis] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        analog_layers(kwargs["model"])  # or it would end in an error only after the first interval

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.interval == 0 or state.global_step == state.max_steps:
            batches = (send_to_device(batch, args.device) for batch in self.batches)
            found = analyze(kwargs["model"], batches, forward=self.forward, verbose=False)
            self.analyses[state.global_step] = found
            self.trainer.log(found.scalars())


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
    state = as_in_model(digital, _read(directory))
    wanted = dtype or next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    model: Any = restore_analog(digital.to(wanted), state, inplace=True)
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def resize_token_embeddings(model: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
    """``model.resize_token_embeddings``, which also keeps an analog output layer analog, with its ranges, clip and config.

    The method alone would put a digital layer in its place or, where the two are tied, leave it with tiles of the old shape.
    Call it before an optimizer is made: parameters are replaced.

    Args:
        model: A converted model of transformers.
        new_num_tokens, args, kwargs: As for the method.

    Returns:
        The input embeddings.
    """
    head = model.get_output_embeddings()
    analog = isinstance(head, AnalogMatrixLayer)
    embeddings = model.resize_token_embeddings(new_num_tokens, *args, **kwargs)
    new = model.get_output_embeddings()
    if analog and new is not head:
        head.weight, head.bias = new.weight, new.bias
        model.set_output_embeddings(head)
    for layer in model.modules():
        if isinstance(layer, AnalogMatrixLayer) and complaint_of_shape(layer) is not None:
            layer.resized()
    return embeddings


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
