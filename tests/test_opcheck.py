"""Every operation is a torch.library operator that schema, fake tensor, autograd and aot dispatch agree on."""

import pytest
import torch
from helpers import seed_of
from torch.fx.experimental.proxy_tensor import make_fx

from triton_analog import ops, reference
from triton_analog.ops.linear import linear_forward

OPERATORS = torch.ops.triton_analog
ROWS, COLUMNS, FEATURES, SLICES = 5, 9, 20, 3

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels on CPU tensors need the interpreter")


def leaf(*shape):
    return torch.randn(shape).requires_grad_()


def samples():
    """Representative arguments of every operator: each optional argument both ways, each differentiable one a leaf."""
    x, weight, grad = (torch.randn(*s) for s in ((ROWS, FEATURES), (COLUMNS, FEATURES), (ROWS, COLUMNS)))
    r, seed, count = torch.tensor([0.5, 1.0, 1.5]), seed_of(3), torch.tensor([0, 5, 9])
    wmax, dynamic = torch.rand(SLICES, COLUMNS) + 0.1, torch.rand(SLICES, ROWS) + 3
    clip, one = torch.rand(SLICES, COLUMNS), torch.ones(1)
    mask = reference.pack_bits(torch.rand(SLICES * ROWS, COLUMNS) > 0.5).view(
        reference.mask_shape(SLICES, ROWS, COLUMNS)
    )
    steps, clipped = ops.dac_steps(x, r, SLICES, 254)
    int8 = torch.randint(-127, 128, (COLUMNS, FEATURES), dtype=torch.int8)
    learned = leaf(SLICES, COLUMNS)
    linear = (leaf(ROWS, FEATURES), leaf(COLUMNS, FEATURES))
    converted = (SLICES, False, 254.0, 0.1, True, 0.1, True, 1.0, True, 254.0, "per_channel", 30.0, "per_channel", 0.1)
    seeds = (seed, seed, None, None, None)
    modifier = ("per_channel", 30.0, "per_channel", 0.1)
    off = (-1.0, 0.0, None, 0.0, None, -1.0, None)
    converters = (254.0, 0.1, wmax, 1.0, wmax, 254.0)
    device = (0.0, 25.0, 3.0, 4.0, -0.1, 0.2, 0.0, 50.0, -2.0, 2.0, 1)
    return [
        ("noise", (seed, 3, 17, 2, 0)),
        ("program", (weight, wmax, seed, torch.rand(8, 4), None, None, "pair", (1.0, 2.0), *device)),
        ("program", (weight, wmax, seed, torch.rand(8, 4), seed + 1, wmax[:, :1], "pair", (1.0,), *device)),
        ("absmax", (x, SLICES)),
        ("moments", (x, SLICES, None)),
        ("moments", (x.T, SLICES, torch.tensor([True, False, True]))),
        ("std", (x, SLICES)),
        ("extrema", (x, SLICES)),
        ("clip", ([x.clone(), weight.clone()], [0.5, 1.5], 0, None)),
        ("clip", ([x.clone(), weight.clone()], [0.5, 1.5], None, None)),
        ("dac", (leaf(ROWS, FEATURES), leaf(SLICES), SLICES, 254.0, 0.1, 0.5, False, 0.0, False, None)),
        ("dac", (leaf(ROWS, FEATURES), dynamic, SLICES, -1.0, 0.0, 0.95, False, 0.1, False, seed)),
        ("dac", (leaf(ROWS, FEATURES), leaf(SLICES), SLICES, 254.0, 0.1, 0.5, True, 0.0, True, seed)),
        ("dac_steps", (x, r, SLICES, 254.0, False, None)),
        ("dac_steps", (x, dynamic, SLICES, 1 / 254, True, seed)),
        ("adc", (leaf(ROWS, COLUMNS), one, 0.1, one, 1.0, wmax[0], 254.0, seed, 1)),
        ("adc", (leaf(ROWS, COLUMNS), dynamic[0], 0.1, wmax[0], 0.0, None, -1.0, seed, 0)),
        ("adc_grad", (grad, mask)),
        ("adc_grad", (grad.T.contiguous().T, mask[1:])),
        ("input_range_grad", (x, x, r, SLICES, 0.1, 0.5, False)),
        ("input_range_grad", (x, x, r, SLICES, -1.0, 0.5, False)),
        ("input_range_update", (r.clone(), count.clone(), r * 0, torch.rand(SLICES, 3) * 50, 10, 3.0)),
        ("input_range_learn", (x, r.clone(), count.clone(), r * 0, SLICES, 10, 3.0)),
        ("input_range_learn", (x, r.clone(), count.clone(), None, SLICES, 10, 3.0)),
        ("input_range_update_fast", (r.clone(), count.clone(), r * -1, r * 2, torch.randn(2, SLICES), 10, 0.9)),
        ("weight", (leaf(COLUMNS, FEATURES), SLICES, None, "per_tensor", 30.0, "per_channel", 0.1, seed, torch.float32, None)),
        ("weight", (leaf(COLUMNS, FEATURES), SLICES, None, "none", 0.0, "none", 0.0, None, torch.bfloat16, None)),
        ("weight", (leaf(COLUMNS, FEATURES), SLICES, learned, "per_channel", 30.0, "none", 0.0, None, torch.float32, None)),
        ("weight", (weight, SLICES, None, "per_tensor", 30.0, "per_tensor", 0.1, seed, torch.float32, wmax[:, :1])),
        ("weight", (weight, SLICES, None, "per_channel", 30.0, "none", 0.0, None, torch.int8, None)),
        ("weight_grad", (weight, weight * 2, clip, SLICES, "per_channel", 30.0)),
        ("matmul", (*linear, None, None, SLICES, *off, None, 0.0, True, 0.0, False)),
        ("matmul", (*linear, leaf(COLUMNS), leaf(SLICES), SLICES, *converters, seed, None, 0.0, True, 0.1, True)),
        ("matmul", (*linear, leaf(COLUMNS), dynamic, SLICES, 254.0, 0.1, wmax[:, :1], 0.0, None, -1.0, seed, None, 0.0, False,
                    0.0, False)),
        ("matmul", (x, weight, None, r, SLICES, *converters, seed, None, 0.0, False, 0.1, True)),
        ("matmul", (x, int8, one.expand(COLUMNS), r, SLICES, *converters, seed, wmax, 254.0, True, 0.0, False)),
        ("matmul", (x, int8, None, dynamic, SLICES, 254.0, *off[1:], wmax[:, :1], 30.0, True, 0.0, False)),
        ("matmul_dgrad", (grad, weight, x, None, r, SLICES, mask, 0.1, 0.5, False, -1.0, False)),
        ("matmul_dgrad", (grad, weight, x, None, r, SLICES, mask, 0.1, 0.5, False, 254.0, True)),
        ("matmul_dgrad", (grad, weight, steps, clipped, r, SLICES, mask, 0.1, 0.5, False, -1.0, False)),
        ("matmul_dgrad", (grad, weight, x, None, None, SLICES, None, 0.0, 0.5, True, -1.0, False)),
        ("matmul_backward", (grad, weight, x, None, r, SLICES, mask, 0.1, 0.5, False, 254.0, torch.float32, torch.float32,
                             0.0, False, None, True)),
        ("matmul_backward", (grad, weight, steps, clipped, r, SLICES, mask, 0.1, 0.5, True, 254.0, torch.bfloat16, None,
                             0.1, True, seed, True)),
        ("matmul_backward", (grad, weight, x, None, dynamic, SLICES, None, 0.0, 0.5, False, 254.0, torch.float32, None,
                             0.0, False, None, True)),
        ("matmul_backward", (grad, weight, x, None, r, SLICES, mask, 0.1, 0.5, False, 254.0, torch.float32, torch.float32,
                             0.0, False, None, False)),
        ("linear_forward", (x, weight, one.expand(COLUMNS), r, None, *seeds, *converted, "full", None, True)),
        ("linear_forward", (x, weight, None, r, None, seed, seed, None, None, wmax[:, :1], SLICES, False, 254.0, 0.0, False, 0.1,
                            False, 1.0, False, 254.0, "per_tensor", 30.0, "per_tensor", 0.1, "full", None, True)),
        ("linear_forward", (x, weight, None, r, clip, *seeds, *converted, "int8", None, True)),
        ("linear_forward", (x, weight, *[None] * 8, SLICES, True, 254.0, 0.0, False,
                            0.0, False, 0.0, False,
                            -1.0, "none", 0.0, "none", 0.0, "full", None, False)),
        ("linear_backward", (grad, x, None, weight, r, None, seed, seed, None, None, mask, SLICES, 254.0, 0.1, True, *modifier,
                             0.1, 0.5, False, True, None, [ROWS, FEATURES], torch.float32, True, True)),
        ("linear_backward", (grad, x, None, weight, r, None, None, seed, None, wmax[:, :1], mask, SLICES, 254.0, 0.0, False,
                             "per_tensor", 30.0, "per_tensor", 0.1, 0.1, 0.5, False, False, None, [ROWS, FEATURES], None, True,
                             True)),
        ("linear_backward", (grad, steps, clipped, weight, r, clip, None, seed, None, None, mask, SLICES, 254.0, 0.0, False,
                             *modifier, 0.1, 0.5, False, True, None, [ROWS, FEATURES], None, False, True)),
        ("linear_backward", (grad, x, None, weight, r, None, seed, seed, None, None, mask, SLICES, 254.0, 0.1, True, *modifier,
                             0.1, 0.5, False, True, None, [ROWS, FEATURES], None, True, False)),
        ("analog_linear", (*linear, leaf(COLUMNS), leaf(SLICES), None, seed, None, None, None, False, 7, 254.0, 0.1, True, 0.1,
                           True, 1.0, True, 254.0, "none", 0.0, "per_channel", 0.1, 0.0, 0.95, False, True, "full", True, 1, None,
                           None, None)),
        ("matmul_wgrad", (grad, x, r, SLICES, mask, 254.0, torch.float32, False, torch.float32, 0.1, True, seed)),
        ("matmul_wgrad", (grad, steps, r, SLICES, mask, 254.0, torch.float32, True, None, 0.1, True, seed)),
        ("matmul_wgrad", (grad, x, None, SLICES, None, -1.0, torch.bfloat16, False, torch.bfloat16, 0.0, False, None)),
    ]  # fmt: skip


CASES = [f"{name}-{index}" for index, (name, _) in enumerate(samples())]


@needs_interpreter
@pytest.mark.parametrize("index", range(len(CASES)), ids=CASES)
def test_opcheck(index, backend):
    name, arguments = samples()[index]
    torch.library.opcheck(getattr(OPERATORS, name).default, arguments)


@pytest.mark.parametrize("index", [i for i, case in enumerate(CASES) if not case.startswith("clip")])
def test_a_batch_of_calls_is_one_call_after_the_other(index):
    """Under vmap, and in the gradients of ``torch.func.grad``; what changes a tensor in place is refused."""
    name, arguments = samples()[index]
    operator = getattr(OPERATORS, name).default
    if any(argument.alias_info is not None for argument in operator._schema.arguments):
        with pytest.raises(RuntimeError, match=f"{name} changes .* in place"):
            torch.func.vmap(lambda x: operator(x, *arguments[1:]))(arguments[0])
        return
    first, *others = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in arguments]
    several = torch.stack([first, first + 1])

    def call(x):
        out = operator(x, *others)
        return out if isinstance(out, torch.Tensor) else tuple(out)

    def total(x):
        return sum(out.sum() for out in torch.utils._pytree.tree_leaves(call(x)) if out.is_floating_point())

    together = torch.utils._pytree.tree_leaves(torch.func.vmap(call)(several))
    alone = zip(*[torch.utils._pytree.tree_leaves(call(x)) for x in several], strict=True)
    assert all(torch.equal(one, torch.stack(parts)) for one, parts in zip(together, alone, strict=True))
    if isinstance(arguments[0], torch.Tensor) and arguments[0].requires_grad:
        x = several[0].requires_grad_()
        (expected,) = torch.autograd.grad(total(x), x)
        assert torch.equal(torch.func.vmap(torch.func.grad(total))(several.detach())[0], expected)


def test_every_operator_is_checked():
    registered = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "triton_analog::" in name
    }
    assert registered == {name for name, _ in samples()}


@needs_interpreter
def test_shapes_may_be_symbols(backend):
    """One traced graph serves other batch sizes."""
    weight, r = torch.randn(COLUMNS, FEATURES), torch.ones(SLICES)
    wmax = ops.absmax(weight, SLICES)

    def step(x, weight, r, wmax):
        converted = ops.dac(x, r, SLICES, 254)
        y, mask = ops.matmul(converted, weight, None, r, SLICES, out_bound=1.0, bound_wmax=wmax)
        dx, _, _ = ops.matmul_dgrad(y, weight, x, r, SLICES, mask)
        return dx + ops.absmax(x, SLICES).sum() + ops.std(x, SLICES).sum() + ops.extrema(x, SLICES).sum()

    traced = make_fx(step, tracing_mode="symbolic")(torch.randn(ROWS, FEATURES), weight, r, wmax)
    for rows in (2, 7, 33):
        x = torch.randn(rows, FEATURES)
        torch.testing.assert_close(traced(x, weight, r, wmax), step(x, weight, r, wmax))


@needs_interpreter
@pytest.mark.parametrize("index", range(len(CASES)), ids=CASES)
def test_a_change_in_place_is_one_for_autograd(index, backend):
    """The version of what an operator changes goes up, so that a backward which needs the old values raises; and of nothing
    else."""
    name, arguments = samples()[index]
    operator = getattr(OPERATORS, name).default
    changed = [argument.name for argument in operator._schema.arguments if argument.alias_info is not None]
    given = dict(zip([argument.name for argument in operator._schema.arguments], arguments, strict=True))
    tensors = {key: value for key, value in given.items() if isinstance(value, torch.Tensor)}
    before = {key: tensor._version for key, tensor in tensors.items()}
    with torch.no_grad():
        operator(*arguments)
    for key, tensor in tensors.items():
        assert (tensor._version > before[key]) is (key in changed), key


def test_whole_numbers_become_floats_past_the_dispatcher_too(monkeypatch):
    """A kernel would be compiled for integers otherwise."""
    seen = []
    monkeypatch.setattr(linear_forward, "_run", lambda *args: seen.extend(args))
    numbers = (SLICES, False, 254, 0, False, 0, False, 1, False, 254, "none", 0, "none", 0)
    with torch.no_grad():
        linear_forward(
            *(torch.randn(ROWS, FEATURES), torch.randn(COLUMNS, FEATURES)), *[None] * 8, *numbers, "full", None, False
        )
    kinds = [str(argument.type) for argument in OPERATORS.linear_forward.default._schema.arguments]
    for kind, value in zip(kinds, seen, strict=True):
        assert isinstance(value, float) == (kind == "float")
