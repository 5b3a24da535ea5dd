"""What a layer keeps for its backward, in bytes, as formulas: this library, AIHWKIT-Lightning's two modes and ``nn.Linear``.

Each formula names its source. ``tests/test_bench.py`` holds all of them against counted bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.recipes import Recipe
from triton_analog import reference
from triton_analog.ops.adc import slices_at_once


@dataclass(frozen=True)
class Layer:
    """A linear layer of a model: ``count`` of them, in ``shared`` by shared of which all have the same input tensor."""

    name: str
    inputs: int
    outputs: int
    count: int = 1
    shared: int = 1


@dataclass(frozen=True)
class Model:
    layers: tuple[Layer, ...]
    """Linear layers of one block."""
    blocks: int


MODELS = {
    "smollm2-135m": Model((Layer("query", 576, 576, 1, 3), Layer("key, value", 576, 192, 2, 3), Layer("out", 576, 576),
                           Layer("gate, up", 576, 1536, 2, 2), Layer("down", 1536, 576)), 30),
    "llama-1b": Model((Layer("query", 2048, 2048, 1, 3), Layer("key, value", 2048, 512, 2, 3), Layer("out", 2048, 2048),
                       Layer("gate, up", 2048, 8192, 2, 2), Layer("down", 8192, 2048)), 16),
    "phi-3-mini": Model((Layer("query, key, value", 3072, 9216), Layer("out", 3072, 3072), Layer("gate, up", 3072, 16384),
                         Layer("down", 8192, 3072)), 32),
    "llama-8b": Model((Layer("query", 4096, 4096, 1, 3), Layer("key, value", 4096, 1024, 2, 3), Layer("out", 4096, 4096),
                       Layer("gate, up", 4096, 14336, 2, 2), Layer("down", 14336, 4096)), 32),
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """Bytes of one layer."""

    saved: int
    """Kept for the backward beyond parameters and input."""
    input: int
    """The input, where the layer keeps the tensor that it was given."""
    forward: int
    """Allocated beside that at the height of the forward, the output included."""
    backward: int
    """Allocated beside what is kept at the height of the backward: output and gradients of input and weight included."""

    @property
    def peak(self) -> int:
        """Of forward and backward of one layer, without parameters and input: an estimate, which a run on a GPU lists beside
        the measured one."""
        return self.saved + max(self.forward, self.backward)


def _noisy_weight(recipe: Recipe) -> bool:
    return recipe.get("modifier.noise_type", "NONE") != "NONE"


def _has_adc(recipe: Recipe) -> bool:
    return recipe.get("forward.out_bound", 0) > 0


def linear(rows: int, k: int, n: int, recipe: Recipe, size: int) -> Kept:
    """``torch.nn.functional.linear`` keeps its input and its weight (``derivatives.yaml``: linear)."""
    return Kept(0, rows * k * size, rows * n * size, (rows * n + rows * k + n * k) * size)


def ours(rows: int, k: int, n: int, recipe: Recipe, size: int) -> Kept:
    """``triton_analog/functional.py``, ``ctx.save_for_backward``: the input, or one byte and two bits of each of its elements;
    the seed; and with an ADC a bit per product and slice. Weights are disturbed again in the backward."""
    slices = reference.num_slices(k, recipe.get("mapping.max_input_size", -1))
    seed = 8 if _noisy_weight(recipe) or recipe.get("forward.out_noise", 0) > 0 else 0
    kept = seed
    if _has_adc(recipe):
        words = 1
        for extent in reference.mask_shape(slices, rows, n):
            words *= extent
        kept += 4 * words
    full = recipe.get("forward.save_input", "FULL") == "FULL"
    if not full:
        kept += rows * k + -(-k // 4) * rows
    weight = n * k * size if _noisy_weight(recipe) else 0
    converted = rows * k * size
    passed = min(slices, slices_at_once(rows * n)) * rows * n * size if _has_adc(recipe) else 0
    return Kept(
        kept,
        rows * k * size if full else 0,
        rows * n * size + weight + converted,  # output, noisy weight, the converter's integers
        # Output, two gradients, noisy weight and integers again, and what each slice lets pass of the gradient (which Hopper's
        # pipeline does without).
        (rows * n + rows * k + n * k) * size + weight + converted + passed,
    )


def lightning(rows: int, k: int, n: int, recipe: Recipe, size: int) -> Kept:
    """``torch_linear.py`` of AIHWKIT-Lightning 2.1.0, per slice: three boolean masks of the input (clamped in
    ``StraightThroughClamp``, both ends in ``InputRangeForward``) and its converted copy; ``|W|`` behind ``amax``; the noisy
    copy of the weight; and with an output bound the slice's output and both bounds, which ``clamp`` keeps."""
    slices = reference.num_slices(k, recipe.get("mapping.max_input_size", -1))
    masks_and_copy = rows * k * (3 + size)
    scaled = _noisy_weight(recipe) or _has_adc(recipe) or recipe.get("forward.out_noise", 0) > 0
    weights = n * k * size * (int(scaled) + int(_noisy_weight(recipe)))
    largest = slices * n * size if scaled else 0  # the result of amax, which its own backward needs
    outputs = slices * rows * n * size if _has_adc(recipe) else 0
    clipped = "PER_CHANNEL" in recipe.get("clip.type", "")
    bounds = 2 * slices * (n if clipped else 1) * size if _has_adc(recipe) else 0
    widest = -(-k // slices)
    return Kept(
        masks_and_copy + weights + largest + outputs + bounds,
        0,
        2 * rows * n * size + 2 * n * widest * size,
        (rows * n + rows * k + n * k) * size + (rows + n) * widest * size,
    )


def lightning_triton(rows: int, k: int, n: int, recipe: Recipe, size: int) -> Kept:
    """``triton_linear.py`` of AIHWKIT-Lightning 2.1.0, ``ctx.save_for_backward``: the input, and an input range per element."""
    slices = reference.num_slices(k, recipe.get("mapping.max_input_size", -1))
    ranges = slices**2 * rows * size  # one per row, repeated for each pair of slices
    masks = 2 * rows * k
    gradients = (rows * k + n * k) * size
    converted = rows * k * size
    outputs = rows * n * size
    return Kept(rows * k * size, rows * k * size, outputs + ranges, outputs + gradients + converted + masks)


FORMULAS = {
    "torch.nn": linear,
    "triton_analog": ours,
    "aihwkit-lightning": lightning,
    "aihwkit-lightning (Triton)": lightning_triton,
}


def rows_of(model: Model, rows: int, recipe: Recipe, size: int) -> list[list[str]]:
    """A table: each layer kind by contender, then the whole model."""

    def text(value: float) -> str:
        return f"{value / 2**20:,.1f}"

    table = []
    totals: dict[str, list[float]] = {}
    for layer in model.layers:
        for name, formula in FORMULAS.items():
            kept = formula(rows, layer.inputs, layer.outputs, recipe, size)
            shape = f"{layer.inputs} to {layer.outputs}"
            table.append(
                [
                    f"{layer.name}: {shape}, {layer.count} a block",
                    name,
                    text(kept.saved),
                    text(kept.input),
                    text(kept.peak),
                ]
            )
            total = totals.setdefault(name, [0.0, 0.0, 0.0])
            total[0] += model.blocks * layer.count * kept.saved
            total[1] += model.blocks * layer.count / layer.shared * kept.input
            total[2] = max(total[2], kept.forward, kept.backward)
    for name, (saved, inputs, largest) in totals.items():
        table.append([f"all {model.blocks} blocks", name, text(saved), text(inputs), text(saved + inputs + largest)])
    return table
