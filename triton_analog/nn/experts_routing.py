"""What experts of a mixture do with the rows that they are sent, whatever computes their products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from triton_analog.nn.compilers import outside_of_graphs
from triton_analog.nn.experts_layout import Layout

Product = Callable[[str, int, Tensor], Tensor]
"""``(stack, expert, rows [M, K]) -> [M, N]``: the product with the matrix of an expert, and its bias."""


class RoutedExperts(nn.Module):
    """Experts that get rows from a router: two products each, with an activation or a gate between them.

    Those are what the class has that is derived from this one: ``act_fn``, or ``_apply_gate``; and ``post_expert_norm``.
    """

    layout: Layout
    num_experts: int

    def products(self) -> Product:
        """The products of one forward."""
        raise NotImplementedError(f"{type(self).__name__} must define products")

    @outside_of_graphs
    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        *,
        router_indices: Tensor | None = None,
        routing_weights: Tensor | None = None,
    ) -> Tensor:
        """``hidden_states [..., H]``, ``T`` rows in all, to the same: the sum of the outputs of experts ``top_k_index [T, k]``
        times ``top_k_weights [T, k]``.

        Indices that are no expert's count for nothing. The last two arguments are names that some modules have for the two
        before. The host waits for the device once, for the number of rows of each expert.
        """
        index = router_indices if top_k_index is None else top_k_index
        weights = routing_weights if top_k_weights is None else top_k_weights
        if index is None or weights is None:
            raise TypeError(f"top_k_index, top_k_weights: {type(self).__name__} needs both, each [tokens, k]")
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, k = weights.reshape(-1, 1), index.shape[-1]
        experts, order = index.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(experts, torch.arange(self.num_experts, device=experts.device), right=True)
        sizes: list[int] = ends.diff(prepend=ends.new_zeros(1)).tolist()
        order = order[: sum(sizes)]
        weighted = self.of_each(x[order // k].split(sizes)) * weights[order]
        width = weighted.shape[1]
        every = weighted.new_zeros(len(x) * k, width).index_copy(0, order, weighted)
        return every.view(len(x), k, width).sum(1).to(x.dtype).view(*hidden_states.shape[:-1], width)

    def of_each(self, rows: Sequence[Tensor], without_rows: Callable[[int], Any] = int) -> Tensor:
        """The outputs of all experts for their ``rows``, one below the other.

        An expert that has none computes nothing; instead, ``without_rows(expert)`` is called when it would be its turn.
        """
        product, outputs = self.products(), []
        for expert, part in enumerate(rows):
            if len(part) > 0:
                outputs.append(self.of_expert(product, expert, part))
            else:
                without_rows(expert)
        return torch.cat(outputs) if outputs else rows[0].new_zeros(0, self.layout.outputs(self))

    def of_expert(self, product: Product, expert: int, rows: Tensor) -> Tensor:
        own: Any = self
        hidden = product(self.layout.up, expert, rows)
        if not self.layout.gated:
            hidden = own.act_fn(hidden)
        elif hasattr(own, "_apply_gate"):
            hidden = own._apply_gate(hidden)
        else:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = own.act_fn(gate) * up
        output = product(self.layout.down, expert, hidden)
        return own.post_expert_norm(output) if getattr(own, "has_post_expert_norm", False) else output


class BatchedExperts(RoutedExperts):
    """Experts that get as many rows each, expert by expert, as those of Llama 4."""

    @outside_of_graphs
    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """``hidden_states [E * T, H]``, the rows of the first expert first, to the same."""
        rows = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
        return self.of_each(rows.unbind(0))


class ParallelExperts(RoutedExperts):
    """One product for each expert, of rows that are sorted by experts, as JetMoe has it."""

    @outside_of_graphs
    def forward(self, inputs: Tensor, expert_size: Sequence[int] | Tensor) -> Tensor:  # type: ignore[override]
        """``inputs [T, K]``, ``expert_size [E]`` rows for each expert, to ``[T, N]``."""
        sizes: Any = expert_size.tolist() if isinstance(expert_size, Tensor) else expert_size
        return self.of_each(inputs.split(sizes))

    def of_expert(self, product: Product, expert: int, rows: Tensor) -> Tensor:
        return product(self.layout.up, expert, rows)
