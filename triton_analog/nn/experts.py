"""The experts of a mixture on analog tiles: modules that keep the matrices of all experts in stacked parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self

from triton_analog.config import TorchInferenceRPUConfig
from triton_analog.nn.containers import AnalogContainerBase, retype
from triton_analog.nn.derived import Derived, derived_class
from triton_analog.nn.expert_matrix import AnalogExpertMatrix
from triton_analog.nn.experts_layout import Layout, find_layout, has_interface, stack_of
from triton_analog.nn.experts_names import NAMES, load_stacked, save_stacked
from triton_analog.nn.experts_routing import BatchedExperts, ParallelExperts, Product, RoutedExperts
from triton_analog.nn.parts import cut_for, uneven_files
from triton_analog.ops.input_range import recomputing


class AnalogExperts(RoutedExperts, Derived, AnalogContainerBase):
    """The experts of a mixture, each of their matrices on tiles of its own.

    Made of a digital module, by :meth:`from_digital` or ``convert_to_analog``, whose class it also derives from: parameters
    with the matrices of all ``E`` experts, their names and their state dict stay, and so do activation and gate. Every matrix
    is an analog layer, ``experts.tiles["gate_up_proj"][3]``, with a config, input ranges, a clip and noise of its own. The
    rows that the router sends to an expert are its batch; one without rows computes nothing, and its ranges stay as they
    are. In a process group, ranks agree which experts have rows anywhere while ranges start up, and ranges without rows on
    this rank get gradients of 0, as the weights do.

    The module needs parameters ``gate_up_proj`` (``[E, 2 * I, H]``) or ``up_proj`` (``[E, I, H]``) and ``down_proj``
    (``[E, H, I]``), or all with the last two dimensions exchanged (see ``is_transposed`` of the module where shapes leave it
    open), perhaps ``<name>_bias [E, N]``; and ``act_fn``, or ``_apply_gate`` from ``[M, 2 * I]`` to ``[M, I]``. For a class
    of your own that computes so, ``conversion_map={..., MyExperts: AnalogExperts}``.

    The state dict has what belongs to the matrices stacked: ``input_range_gate_up_proj [E, S]``.

    ``torch.compile`` leaves it out of its graphs: which rows an expert gets is data.
    """

    PREFIX = "Analog"
    ANALOG_NAMES: ClassVar[frozenset[str]] = frozenset({"tiles", "layout"})
    tiles: nn.ModuleDict

    @classmethod
    def find_layout(cls, module: nn.Module) -> Layout:
        """Where ``module`` keeps the matrices.

        Raises:
            ValueError: it does not have them as this class needs them.
        """
        return find_layout(module)

    @classmethod
    def from_digital(cls, module: nn.Module, rpu_config: TorchInferenceRPUConfig) -> Self:
        """Analog experts with the very parameters of ``module``, in its mode and on its device.

        Raises:
            ConfigError: ``rpu_config`` is not valid.
            ValueError: ``module`` has not the parameters that are needed.
        """
        layout = cls.find_layout(module)
        stacks = dict.fromkeys((layout.up, layout.down))
        new = retype(module, derived_class(cls, type(module)))
        new.layout = layout
        new.num_experts = len(stack_of(module, layout.up))
        new.tiles = nn.ModuleDict(
            {
                stack: nn.ModuleList(
                    AnalogExpertMatrix(new, stack, expert, layout.transposed, rpu_config)
                    for expert in range(new.num_experts)
                )
                for stack in stacks
            }
        )
        return new

    @classmethod
    def to_digital(cls, module: AnalogExperts) -> nn.Module:
        """A module of the original class with the very parameters of ``module``; ranges and clips are left behind."""
        digital = retype(module, module._original)
        del digital.tiles
        del digital.__dict__["layout"]
        return digital

    def products(self) -> Product:
        """The products of a forward. The parts of the parameters are cut out once: their gradients are then one each."""
        given: dict[str, list[dict[str, Tensor]]] = {}
        for stack in self.tiles:
            # Perhaps computed by a parametrization, as adapters of experts are.
            whole = {name: getattr(self, name, None) for name in (stack, f"{stack}_bias")}
            parts = {name: parameter.unbind(0) for name, parameter in whole.items() if parameter is not None}
            given[stack] = [dict(zip(parts, own, strict=True)) for own in zip(*parts.values(), strict=True)]
        tiles: Any = self.tiles
        return lambda stack, expert, rows: tiles[stack][expert](rows, given[stack][expert])

    # ---- State --------------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Under the names of the state dict, which some libraries look for: what each of the matrices has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            for stack in self.tiles if "tiles" in self._modules else ():
                own = name.removesuffix(f"_{stack}")
                if own != name and own in NAMES:
                    return tuple(getattr(layer, own) for layer in self.tiles[stack])  # type: ignore[attr-defined]
            raise

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """As torch's; what the matrices save is stacked."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        save_stacked(self.tiles, state, prefix)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        uneven = uneven_files(self.parameters(), state_dict, prefix)
        if uneven is not None:
            args[-1].append(uneven)  # the messages of all errors
            return
        load_stacked(self.tiles, state_dict, prefix)
        cut_for(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        for stack, layers in self.tiles.items():
            if prefix + stack in state_dict:  # a learned clip that is not in the file starts anew
                with layers[0].whole(stack):  # type: ignore[index]
                    for layer in layers:  # type: ignore[attr-defined]
                        layer.reset_weight_clip()

    # ---- Ranks --------------------------------------------------------------------------------------------------------

    def of_each(self, rows: Sequence[Tensor], without_rows: Callable[[int], Any] = int) -> Tensor:
        """In a process group, ranges start up with the rows of all ranks, and none is without a gradient."""
        layers = list(zip(*(list(own) for own in self.tiles.values()), strict=True))  # type: ignore[call-overload]
        group = layers[0][0]._statistics_group() if self.training else None
        if group is None:
            return super().of_each(rows, without_rows)
        elsewhere = self._elsewhere(rows, layers, group)

        def join(expert: int) -> None:
            for layer in layers[expert]:
                if expert in elsewhere and layer._range_starts_up():
                    layer._learn_range(layer.weight.new_empty(0, layer.in_features))

        outputs = super().of_each(rows, join)
        idle = [
            parameter.flatten()
            for own, part in zip(layers, rows, strict=True)
            if len(part) == 0
            for layer in own
            for parameter in layer.parameters()
            if parameter.requires_grad
        ]
        return outputs + 0 * torch.cat(idle).sum().to(outputs.dtype) if idle else outputs

    def _elsewhere(self, rows: Sequence[Tensor], layers: Sequence[Sequence[Any]], group: Any) -> set[int]:
        """The experts without rows here whose ranges start up with those of other ranks now."""
        starting = any(layer._range_starts_up() for own in layers for layer in own)
        if not starting or recomputing():
            return set()
        counts = torch.tensor([len(part) for part in rows], device=rows[0].device)
        dist.all_reduce(counts, group=group)
        return {expert for expert, count in enumerate(counts.tolist()) if count > 0 and len(rows[expert]) == 0}


class AnalogBatchedExperts(BatchedExperts, AnalogExperts):
    """:class:`AnalogExperts` for modules that give each expert as many rows, such as those of Llama 4."""


class AnalogParallelExperts(ParallelExperts, AnalogExperts):
    """:class:`AnalogExperts` with one parameter ``weight [E, N, K]``, a product for each expert, as JetMoe has it."""

    @classmethod
    def find_layout(cls, module: nn.Module) -> Layout:
        stack_of(module, "weight")
        return Layout("weight", "weight", False, False)


_FAMILIES = {
    "Llama4TextExperts": AnalogBatchedExperts,
    "JetMoeParallelExperts": AnalogParallelExperts,
    "GraniteMoeParallelExperts": AnalogParallelExperts,
    "GraniteMoeSharedParallelExperts": AnalogParallelExperts,
    "GraniteMoeHybridParallelExperts": AnalogParallelExperts,
}
"""Classes of transformers that do not keep to its interface for experts."""


def experts_in(model: nn.Module) -> dict[type[nn.Module], Any]:
    """The analog class of every class of experts in ``model`` whose forward is known."""
    found: dict[type[nn.Module], Any] = {}
    for module in model.modules():
        kind = type(module)
        family = _FAMILIES.get(kind.__name__) if kind.__module__.startswith("transformers.") else None
        if family is not None:
            found[kind] = family
        elif not isinstance(module, AnalogContainerBase) and has_interface(module):
            found[kind] = AnalogExperts
    return found
