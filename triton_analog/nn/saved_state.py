"""What a file holds of a layer beside its parameters: the config, and how old and foreign files are read."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from triton_analog.calls import draw_seed
from triton_analog.config import ConfigError, TorchInferenceRPUConfig
from triton_analog.nn.outside import follow_or_refuse
from triton_analog.nn.parts import cut_for, is_dtensor
from triton_analog.nn.range_startup import RangeStartup
from triton_analog.nn.settings import decode, encode
from triton_analog.nn.split import RANGE_BUFFERS
from triton_analog.nn.stored_weight import StoredWeight
from triton_analog.nn.weight_noise import WeightNoise


class SavedState(StoredWeight, RangeStartup, WeightNoise):
    """The part of a layer that writes and reads state dicts."""

    learnable_weight_clip: nn.Parameter | None
    _numbers_of: tuple[TorchInferenceRPUConfig, int] | None
    _missed_config = False

    def reconfigure(self, rpu_config: TorchInferenceRPUConfig) -> None:
        """Change to a copy of ``rpu_config``."""
        raise NotImplementedError(f"{type(self).__name__} must define reconfigure")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        follow_or_refuse(self, prefix.rstrip("."))  # a file with tiles of another shape than the weight would not load
        self._mend_counter()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = prefix + "input_range"
        if name in destination:
            destination[name] = self._saved_range(destination[name])
        if self.split is not None:
            for name in (prefix + buffer for buffer in RANGE_BUFFERS):
                if name in destination:
                    destination[name] = self.split.saved(destination[name])

    def get_extra_state(self) -> Tensor:
        """The config as JSON in a ``uint8`` tensor, which every checkpoint format can hold."""
        return encode(self.rpu_config)

    @property
    def _extra_state(self) -> Tensor:
        """What a loader that sets tensors one by one finds under the name of the config (:class:`BuffersWithConfig`)."""
        return self.get_extra_state()

    def take_config(self, state: Tensor) -> None:
        """:meth:`set_extra_state`, from such a loader. It expects buffers to have memory, and has not all of them to load."""
        if state.is_meta:  # it has put the config itself elsewhere, onto a disk
            self._missed_config, self._numbers_of = True, None
        else:
            self.set_extra_state(state)
        device = torch.device("cpu") if state.is_meta else state.device
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_meta:
                self._buffers[name] = torch.zeros_like(buffer, device=device)
        if self.weight_noise_seed is not None and self.weight_noise_seed.is_meta:
            self.weight_noise_seed = draw_seed(device)

    def _complain_of_missed_config(self) -> None:
        self._missed_config = False
        warnings.warn(
            "the config of an analog layer in the checkpoint was offloaded to a disk, unread: the layer goes on with the config "
            "that it was converted with. Load with load_checkpoint_and_dispatch from triton_analog.integrations.accelerate, "
            "which reads all configs first",
            stacklevel=2,
        )

    def set_extra_state(self, state: Any) -> None:
        """Change to the config in ``state``, as :meth:`reconfigure` does.

        Raises:
            ConfigError: ``state`` holds no config, or one that does not fit. The layer is then unchanged.
        """
        self.reconfigure(decode(state, type(self.rpu_config)))
        self._missed_config = False

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # The config comes first: it decides which parameters there are to be filled.
        state = state_dict.get(prefix + "_extra_state")
        # With this torch.distributed.checkpoint says that the file has none.
        without_config = type(state).__name__ == "_EXTRA_STATE"
        if without_config:
            del state_dict[prefix + "_extra_state"]
        elif state is not None:
            try:
                self.set_extra_state(state)
            except ConfigError as error:
                error_msgs.append(f"{prefix}_extra_state: {error}")
                return
        mismatch = self._other_slices(state_dict, prefix)
        if mismatch is not None:
            error_msgs.append(mismatch)
            return
        self._convert_counter(state_dict, prefix)
        cut_for(self, state_dict, prefix)
        if self.split is not None:
            for name in (prefix + buffer for buffer in RANGE_BUFFERS):
                if name in state_dict:
                    state_dict[name] = self.split.loaded(state_dict[name])
        names = "weight", "learnable_weight_clip"
        has_weight, has_clip = (self._comes_from_elsewhere(state_dict, prefix, name) for name in names)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "_extra_state" in missing_keys:  # a file of torch's layer, or of AIHWKIT-Lightning's
            missing_keys.remove(prefix + "_extra_state")
        if prefix + "input_range_update_idx" in state_dict:
            self._continue_loaded_range()
        self._reset_residual()
        source = self.weight_source
        if source is not None:
            self._fit_weight_noise(source.device)
        # Into a weight in parts torch may have loaded the file in place before it came here.
        has_weight = has_weight or (without_config and is_dtensor(self._parameters.get("weight")))
        if has_weight and not has_clip:
            self.reset_weight_clip()

    def _comes_from_elsewhere(self, state_dict: dict[str, Any], prefix: str, name: str) -> bool:
        """Whether there are numbers to load: ``set_model_state_dict`` of torch fills a file up with what the model has."""
        given, own = state_dict.get(prefix + name), self._parameters.get(name)
        return given is not None and (own is None or not _is_same_memory(given, own))

    def _other_slices(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """What is wrong with a file that has other slices, as its tensors show; it need not hold a config that says so."""
        inputs = self.tile_shape[1]
        for name, own, groups in (
            ("input_range", self.input_range, self.groups),
            ("learnable_weight_clip", self.learnable_weight_clip, 1),
        ):
            saved = state_dict.get(prefix + name)
            if own is None or not isinstance(saved, Tensor) or saved.ndim != own.ndim or saved.shape[0] == len(own):
                continue
            slices = max(saved.shape[0] // groups, 1)
            widths = [inputs // slices + (s < inputs % slices) for s in range(slices)]
            return (
                f"{prefix}{name}: the file has shape {tuple(saved.shape)}, of slices of {widths}, but this layer "
                f"{tuple(own.shape)}, of slices of {self.get_split_sizes()} (mapping.max_input_size is "
                f"{self.rpu_config.mapping.max_input_size}); build it with the max_input_size that was saved instead"
            )
        return None


def _is_same_memory(first: Any, second: Any) -> bool:
    """Also if there is none: parts may be empty, and the ranks must agree."""
    first, second = (tensor.to_local() if is_dtensor(tensor) else tensor for tensor in (first, second))
    alike = (first.dtype, first.device) == (second.dtype, second.device) and not first.is_meta
    return alike and first.is_set_to(second)
