"""Where an operation runs, offsets beyond 32 bits, what importing does, and every argument error."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton
from helpers import randn, seed_of, viewed
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_analog import launch, ops, reference
from triton_analog.launch import backends
from triton_analog.ops.matmul import MatmulConfig, launch_matmul

HOPPER = GPUTarget("cuda", 90, 32)


@pytest.fixture
def unforced(monkeypatch):
    """As a user finds the library: no backend chosen, no interpreter, a GPU's Triton."""
    monkeypatch.setattr(backends, "_forced", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return monkeypatch


# ---- Choice of backend ------------------------------------------------------------------------------------------------


def test_cpu_tensors_run_the_reference(unforced):
    assert not launch.runs_kernel(torch.ones(1))


def test_the_interpreter_runs_kernels_on_cpu_tensors(unforced):
    unforced.setenv("TRITON_INTERPRET", "1")
    assert launch.runs_kernel(torch.ones(1))


def test_the_interpreters_variable_set_to_0_means_off(unforced):
    unforced.setenv("TRITON_INTERPRET", "0")
    assert not launch.runs_kernel(torch.ones(1))


def test_other_devices_run_kernels(unforced):
    assert launch.runs_kernel(SimpleNamespace(dtype=torch.float32, device=torch.device("cuda:0"), numel=lambda: 1))


@pytest.mark.parametrize("x", [torch.ones(1, dtype=torch.float64), torch.ones(0, 3)], ids=["fp64", "empty"])
def test_fp64_and_empty_tensors_always_run_the_reference(x):
    with launch.backend("kernel"):
        assert not launch.runs_kernel(x)


@pytest.mark.parametrize(("target", "expected"), [("cpu", True), ("cuda", False)])
def test_a_triton_cpu_driver_runs_kernels_on_cpu_tensors(target, expected, unforced):
    unforced.setattr(triton.backends, "backends", {"cpu": object()})
    active = SimpleNamespace(get_current_target=lambda: SimpleNamespace(backend=target))
    unforced.setattr(backends, "driver", SimpleNamespace(active=active))
    backends._has_triton_cpu.cache_clear()
    started = []
    try:
        assert launch.runs_kernel(torch.ones(1)) is expected
        with launch.recording(lambda kernel, args, options: started.append(kernel), HOPPER):
            ops.absmax(torch.ones(2, 3), 1)
    finally:
        backends._has_triton_cpu.cache_clear()
    assert bool(started) is expected


def test_without_triton_cpu_the_driver_is_left_alone(unforced):
    class Untouchable:
        @property
        def active(self):
            raise AssertionError("asked for the driver")

    unforced.setattr(backends, "driver", Untouchable())
    assert not launch.runs_kernel(torch.ones(1))


def test_a_forced_backend_ends_with_its_block():
    for name, expected in (("kernel", True), ("reference", False)):
        before = backends._forced
        with launch.backend(name):
            assert launch.runs_kernel(torch.ones(1)) is expected
        assert backends._forced == before
    with pytest.raises(KeyError), launch.backend("kernel"):
        raise KeyError
    assert backends._forced == before


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="got 'cuda'; allowed are 'kernel' and 'reference'"), launch.backend("cuda"):
        pass


def test_recording_starts_nothing():
    launches = []
    with launch.backend("kernel"), launch.recording(lambda *launched: launches.append(launched), HOPPER):
        ops.dac(torch.ones(2, 3), torch.ones(1), 1, 254)
    ((kernel, args, options),) = launches
    assert kernel is sys.modules["triton_analog.ops.dac"].dac_kernel
    assert [arg for arg in args if isinstance(arg, float)] == [127.0, 0.0], "half the steps, and no noise"
    assert options["QUANTIZE"] is True


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (HOPPER, ("sm_90", 90)),
        (GPUTarget("cuda", 120, 32), ("sm_120", 120)),
        (GPUTarget("hip", "gfx942", 64), ("gfx942", 0)),
    ],
)
def test_a_recording_chooses_as_for_its_target(target, expected):
    with launch.recording(lambda *launched: None, target, name="a name"):
        assert launch.hardware(torch.device("cpu")) == ("a name", *expected)
    assert launch.hardware(torch.device("cpu")) == ("cpu", "cpu", 0)


# ---- Descriptors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view", "columns", "expected"),
    [
        (lambda x: x, 12, True),
        (lambda x: x[:, :9], 12, True),
        (lambda x: x[1:], 12, True),
        (lambda x: x[:, 4:], 12, True),
        (lambda x: x, 9, False),
        (lambda x: x[:, 1:], 12, False),
        (lambda x: x[:, ::2], 12, False),
        (lambda x: x.T, 12, False),
        (lambda x: x[:, :1].expand(12, 12), 12, False),
        (lambda x: x[:1].expand(12, 12), 12, False),
    ],
    ids=[
        "rows", "left columns", "lower rows", "right columns", "odd rows", "odd start", "gaps", "columns", "one column",
        "one row",
    ],
)  # fmt: skip
def test_descriptors_address_aligned_rows(view, columns, expected):
    """What they cannot address is loaded without them."""
    x = view(torch.randn(12, columns))
    assert launch.describable(x) is expected
    launches = []
    config = MatmulConfig(16, 32, 16)
    with launch.recording(lambda *launched: launches.append(launched), HOPPER):
        launch_matmul(x, x, None, None, 1, -1.0, 0.0, None, 0.0, None, -1.0, None, config=config)
    ((_, args, options),) = launches
    assert options["DESCRIPTORS"] is expected
    assert [isinstance(arg, TensorDescriptor) for arg in args[:2]] == [expected] * 2


@pytest.mark.parametrize(
    ("dtype", "features", "slices", "expected"),
    [
        (torch.float32, 9, 1, True),
        (torch.float32, 24, 3, True),
        (torch.float32, 24, 4, False),
        (torch.float32, 25, 3, False),
        (torch.bfloat16, 24, 3, True),
        (torch.bfloat16, 24, 2, False),
        (torch.int8, 48, 3, True),
        (torch.int8, 24, 3, False),
    ],
)
def test_descriptors_load_slices_that_start_aligned(dtype, features, slices, expected):
    assert launch.slices_describable(torch.empty(2, features, dtype=dtype), slices) is expected


@pytest.mark.parametrize(("precision", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_fp32_dots_follow_torch_s_setting(precision, expected):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert launch.input_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("size", "expected"), [(0, 16), (1, 16), (17, 32), (64, 64), (65, 64), (10**9, 64)])
def test_a_block_covers_its_size_within_limits(size, expected):
    assert launch.block(size, 64) == expected


# ---- Offsets beyond 2**31 elements --------------------------------------------------------------------------------------

FAR = 2**30
"""A stride that fits 32 bits while twice the stride does not."""


@pytest.fixture(scope="module")
def far_memory():
    """Address space for 2 * FAR fp16 numbers on either side, so that an offset that wraps around reads something else.

    The tests touch a few pages of it.
    """
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 16 * FAR:
        pytest.skip("not enough memory on the GPU")
    return torch.empty(4 * FAR + 64, dtype=torch.float16, device="cuda" if torch.cuda.is_available() else "cpu")


def filled(x, *shape):
    return torch.ones(shape, device=x.device, dtype=x.dtype)


def clipped(x):
    before = x.clone()
    ops.clip([x], [1.0], 0)
    result = x.clone()
    x.copy_(before)
    return result


READERS = {
    "absmax": lambda x: ops.absmax(x, 2),
    "clip": clipped,
    "moments": lambda x: ops.moments(x, 2),
    "extrema": lambda x: ops.extrema(x, 2),
    "dac": lambda x: ops.dac(x, filled(x, 2), 2, 254),
    "dac_steps": lambda x: ops.dac_steps(x, filled(x, 2), 2, 254),
    "adc": lambda x: ops.adc(x, filled(x, 1), out_bound=1.0, bound_wmax=filled(x, 1)),
    "adc_grad": lambda x: ops.adc_grad(x, torch.zeros(1, 1, 3, 4, dtype=torch.int32, device=x.device)),
    "weight": lambda x: ops.weight(x, 2, quantization="per_channel", res=30)[0],
    "weight_grad": lambda x: ops.weight_grad(x, x, filled(x, 2, 3), 2)[0],
    "input_range_grad": lambda x: ops.input_range_grad(x, x, filled(x, 2), 2)[0],
    "matmul": lambda x: ops.matmul(x, x, None, None, 2)[0],
    "matmul, converted": lambda x: ops.matmul(x, x, None, filled(x, 2), 2, inp_res=254)[0],
    "matmul_backward": lambda x: ops.matmul_backward(x, x, x, filled(x, 2), 2, inp_res=254, bias_dtype=torch.float32),
    "matmul_dgrad": lambda x: ops.matmul_dgrad(x, x, x, filled(x, 2), 2)[0],
    "matmul_wgrad": lambda x: ops.matmul_wgrad(x, x, None, 2, bias_dtype=torch.float32),
}


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("strides", [(FAR, 1), (1, FAR)], ids=["rows", "columns"])
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_elements_beyond_32_bits_are_found(reader, strides, backend, far_memory):
    x = torch.as_strided(far_memory, (3, 3), strides, storage_offset=2 * FAR)
    x.copy_(randn(3, 3, device=x.device))
    torch.testing.assert_close(reader(x), reader(x.clone(memory_format=torch.contiguous_format)), rtol=0, atol=0)


# ---- Import -------------------------------------------------------------------------------------------------------------


def test_importing_touches_no_gpu_and_no_optional_package():
    code = """if True:
        import sys, torch
        import triton_analog, triton_analog.ops, triton_analog.functional, triton_analog.nn
        assert not torch.cuda.is_initialized()
        heavy = {"sklearn", "matplotlib", "tqdm", "aihwkit", "aihwkit_lightning", "scipy", "pytest"}
        heavy |= {"transformers", "accelerate", "safetensors", "deepspeed"}
        assert not heavy & (set(sys.modules) - set(before)), heavy & set(sys.modules)
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    before = "import sys, torch, triton, numpy; before = list(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", before + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- Argument errors ----------------------------------------------------------------------------------------------------

X, W, G = torch.ones(4, 6), torch.ones(5, 6), torch.ones(4, 5)
R, ONE, SEED, COUNT = torch.ones(2), torch.ones(1), seed_of(1), torch.zeros(2, dtype=torch.int64)
WMAX, CLIP, MOMENTS = torch.ones(2, 5), torch.ones(2, 5), torch.ones(2, 3)
MASK = torch.zeros(reference.mask_shape(2, 4, 5), dtype=torch.int32)
INT8, STEPS, FLAGS = W.to(torch.int8), X.to(torch.int8), torch.zeros(2, 4, 1, dtype=torch.uint8)
SCALED = {"inp_res": 254, "weight_wmax": WMAX, "weight_res": 254}
META = torch.ones(2, device="meta")
UPDATE = {"init_from_data": 10, "init_std_alpha": 3.0}
FAST = {"init_from_data": 10, "momentum": 0.9}


def call(function, *args, **kwargs):
    return lambda: function(*args, **kwargs)


def rows(function, *cases):
    return [(call(function, *args, **kwargs), error, match) for args, kwargs, error, match in cases]


def update_fast(r=R, count=COUNT, x_min=R, x_max=R, extrema=None, **options):
    extrema = torch.ones(2, 2) if extrema is None else extrema
    return ops.input_range_update_fast(r, count, x_min, x_max, extrema, **(FAST | options))


MATRIX = [
    *((f, TypeError, r"\w+: got dtype torch.int64; allowed are float32, bfloat16, float16 and float64", X.long())
      for f in (ops.absmax, ops.moments, ops.std, ops.extrema)),
    *((f, ValueError, r"x: got shape \(2, 4, 6\); a matrix is needed, flatten leading dimensions with reshape",
       torch.ones(2, 4, 6)) for f in (ops.absmax, ops.moments, ops.std, ops.extrema)),
    *((f, ValueError, r"x: got shape \(0, 6\); an empty tensor has no", torch.ones(0, 6))
      for f in (ops.moments, ops.std, ops.extrema)),
]  # fmt: skip
SLICES_MESSAGE = r"slices: got {} for 6 input features; allowed are 1 to the number of features"
SLICED = {
    "absmax": lambda s: ops.absmax(X, s),
    "moments": lambda s: ops.moments(X, s),
    "std": lambda s: ops.std(X, s),
    "extrema": lambda s: ops.extrema(X, s),
    "dac": lambda s: ops.dac(X, R, s),
    "dac_steps": lambda s: ops.dac_steps(X, R, s, 254),
    "input_range_grad": lambda s: ops.input_range_grad(X, X, R, s),
    "weight": lambda s: ops.weight(W, s),
    "weight_grad": lambda s: ops.weight_grad(W, W, CLIP, s),
    "matmul": lambda s: ops.matmul(X, W, None, None, s),
    "matmul_backward": lambda s: ops.matmul_backward(G, W, X, None, s),
    "matmul_dgrad": lambda s: ops.matmul_dgrad(G, W, X, None, s),
    "matmul_wgrad": lambda s: ops.matmul_wgrad(G, X, None, s),
}


@pytest.mark.parametrize("slices", [0, -1, 7])
@pytest.mark.parametrize("sliced", SLICED.values(), ids=SLICED)
def test_slices_are_between_one_and_the_features(sliced, slices):
    with pytest.raises(ValueError, match=SLICES_MESSAGE.format(slices)):
        sliced(slices)


@pytest.mark.parametrize(("function", "error", "match", "x"), MATRIX)
def test_statistics_need_a_matrix(function, error, match, x):
    with pytest.raises(error, match=match):
        function(x, 1)


ERRORS = [
    *rows(
        ops.noise,
        ((None, 1, 1), {}, ValueError, "seed: missing, but noise draws noise; pass an int64 tensor"),
        ((ONE, 1, 1), {}, TypeError, "seed: got torch.float32 .* an int64 tensor with one element, or .* needed"),
        ((COUNT, 1, 1), {}, TypeError, r"seed: got torch.int64 of shape \(2,\)"),
        ((SEED, -1, 1), {}, ValueError, r"rows: got -1; allowed are 0 to 2\*\*33"),
        ((SEED, 1, 2**34 + 1), {}, ValueError, r"cols: got \d+; allowed are 0 to 2\*\*34"),
        ((SEED, 1, 1), {"stream": 2**32}, ValueError, "stream: got .* allowed are 0 to"),
        ((SEED, 1, 1), {"plane": -1}, ValueError, "plane: got -1; allowed are 0 to"),
    ),
    *rows(
        ops.moments,
        ((X, 2, ONE), {}, ValueError, r"active: got torch.float32 .* a bool tensor of shape \(2,\) is needed"),
        ((X, 2, torch.ones(3, dtype=torch.bool)), {}, ValueError, r"active: got torch.bool of shape \(3,\)"),
        ((X, 2, META.bool()), {}, ValueError, "active: on meta, but x is on cpu; move both to one device"),
    ),
    *rows(
        ops.dac,
        ((X, ONE, 2), {}, ValueError, r"input_range: got shape \(1,\); allowed are \(2,\) for a static range"),
        ((X, torch.ones(4, 2), 2), {}, ValueError, r"input_range: .* \(2, 4\) for a dynamic one"),
        ((X, META, 2), {}, ValueError, "input_range: on meta, but x is on cpu"),
        ((X, R, 2, float("inf")), {}, ValueError, "inp_res: got inf; allowed are 2 to"),
        (
            (X, R, 2, 2**23),
            {},
            ValueError,
            r"inp_res: got \d+; .* 2 to 2\*\*22 steps, the inverse of that, or <= 0 for off",
        ),
        ((X, R, 2, 2.0**-23), {}, ValueError, "inp_res: got .* the inverse of that"),
        ((X, R, 2), {"decay": -0.1}, ValueError, "decay: got -0.1; allowed is a finite number >= 0"),
        ((X, R, 2), {"input_min_percentage": 95}, ValueError, r"input_min_percentage: got 95; .* a share in 0 \.\. 1"),
    ),
    *rows(
        ops.dac_steps,
        ((X, ONE, 2, 254), {}, ValueError, r"input_range: got shape \(1,\); allowed are \(2,\) for a static range"),
        ((X, META, 2, 254), {}, ValueError, "input_range: on meta, but x is on cpu"),
        ((X, R, 2, 255), {}, ValueError, "inp_res: got 255; int8 holds at most 254 steps, so 2 to 254 or the inverse"),
        ((X, R, 2, -1), {}, ValueError, "inp_res: got -1; int8 holds at most 254 steps"),
        ((STEPS, R, 2, 254), {}, TypeError, "x: got dtype torch.int8; allowed are float32"),
    ),
    *rows(
        ops.input_range_grad,
        ((X[:2], X, R, 2), {}, ValueError, r"grad: got shape \(2, 6\); that of x, \(4, 6\), is needed"),
        ((G, X, R, 2), {}, ValueError, r"grad: got shape \(4, 5\); 6 columns are needed"),
        ((X, X, torch.ones(2, 4), 2), {}, ValueError, r"input_range: .* one range per slice is needed, \(2,\)"),
    ),
    *rows(
        ops.adc,
        ((G, R), {}, ValueError, r"input_range: got shape \(2,\); allowed are \(1,\) and \(4,\)"),
        ((G, ONE), {"out_noise": -1.0}, ValueError, "out_noise: got -1.0; allowed is a finite number >= 0"),
        ((G, ONE), {"out_noise": 0.1, "seed": SEED}, ValueError, "noise_wmax: missing, but out_noise is scaled by it"),
        ((G, ONE), {"out_noise": 0.1, "noise_wmax": ONE}, ValueError, "seed: missing, but out_noise > 0 draws noise"),
        ((G, ONE), {"out_bound": 1.0}, ValueError, "bound_wmax: missing, but out_bound is scaled by it"),
        ((G, ONE), {"out_bound": float("nan")}, ValueError, "out_bound: got nan; allowed is a finite number"),
        ((G, ONE), {"out_res": 254}, ValueError, "out_res: got 254 with out_bound 0.0; .* set out_bound > 0"),
        ((G, ONE), {"out_bound": 1.0, "bound_wmax": R}, ValueError, r"bound_wmax: .* allowed are \(1,\) and \(5,\)"),
        ((G, ONE), {"plane": 2**31}, ValueError, "plane: got .* allowed are 0 to"),
    ),
    *rows(
        ops.adc_grad,
        ((G, MASK[0]), {}, ValueError, r"mask: .* a contiguous int32 tensor of shape \(1, 1, 4, 4\) is needed"),
        ((G, MASK.byte()), {}, ValueError, "mask: got torch.uint8"),
        ((G, 3), {}, TypeError, "mask: got int; a torch.Tensor is needed"),
        ((G.long(), MASK), {}, TypeError, "grad: got dtype torch.int64"),
        ((G, MASK.to("meta")), {}, ValueError, "mask: on meta, but grad is on cpu; move both to one device"),
    ),
    *rows(
        ops.weight,
        (
            (W, 2),
            {"quantization": "discretize"},
            ValueError,
            "quantization: got 'discretize'; allowed are 'none', 'per_",
        ),
        (
            (W, 2),
            {"quantization": "per_channel"},
            ValueError,
            "res: got 0.0 with quantization 'per_channel'; give a number",
        ),
        (
            (W, 2),
            {"clip": R},
            ValueError,
            r"clip: got shape \(2,\); one value per slice and channel, \(2, 5\), is needed",
        ),
        ((W, 2), {"clip": CLIP, "quantization": "per_tensor", "res": 30}, ValueError, "use 'per_channel' or 'none'"),
        ((W, 2), {"noise_type": "normal"}, ValueError, "noise_type: got 'normal'; allowed are"),
        ((W, 2), {"std_dev": -0.1}, ValueError, "std_dev: got -0.1; allowed is"),
        (
            (W, 2),
            {"noise_type": "per_tensor", "std_dev": 0.1},
            ValueError,
            "seed: missing, but weight noise draws noise",
        ),
    ),
    *rows(
        ops.weight_grad,
        ((X, W, CLIP, 2), {}, ValueError, r"grad: got shape \(4, 6\); \(5, 6\) is needed"),
        ((W, W, R, 2), {}, ValueError, r"clip: got shape \(2,\); .* \(2, 5\), is needed"),
    ),
    *rows(
        ops.input_range_update,
        ((R, COUNT.float(), R, MOMENTS), UPDATE, TypeError, "count: got torch.float32; int32 or int64 is needed"),
        (
            (R, COUNT[:1], R, MOMENTS),
            UPDATE,
            ValueError,
            r"count: got shape \(1,\) .* one entry per slice, \(2,\), is needed",
        ),
        (
            (torch.ones(4)[::2], COUNT, R, MOMENTS),
            UPDATE,
            ValueError,
            r"input_range: .* strides \(2,\); a contiguous vector",
        ),
        ((R, COUNT, ONE, MOMENTS), UPDATE, ValueError, r"residual: got shape \(1,\)"),
        ((R, COUNT, R, X), UPDATE, ValueError, r"moments: got shape \(4, 6\); \(2, 3\) is needed"),
        ((R, COUNT, R, MOMENTS), UPDATE | {"init_from_data": -1}, ValueError, "init_from_data: got -1; allowed is"),
        ((R, COUNT, R, MOMENTS), UPDATE | {"init_std_alpha": -1.0}, ValueError, "init_std_alpha: got -1.0; allowed is"),
    ),
    *rows(
        update_fast,
        ((), {"x_min": ONE}, ValueError, r"x_min: got shape \(1,\) .* a contiguous vector with one entry per slice"),
        ((), {"x_max": META}, ValueError, "x_max: on meta, but input_range is on cpu; move both to one device"),
        ((), {"extrema": MOMENTS}, ValueError, r"extrema: got shape \(2, 3\); \(2, 2\) is needed"),
        ((), {"momentum": 1.0}, ValueError, r"momentum: got 1.0; allowed are \[0, 1\), and -1 for all-time extremes"),
        ((), {"momentum": -0.5}, ValueError, "momentum: got -0.5; allowed are"),
    ),
    *rows(
        ops.matmul,
        ((X, G, None, None, 1), {}, ValueError, r"weight: got shape \(4, 5\); 6 columns are needed"),
        ((X, W.half(), None, None, 1), {}, TypeError, "weight: dtype torch.float16, but x is torch.float32; cast one"),
        ((X, W, ONE, None, 1), {}, ValueError, r"bias: got shape \(1,\); \(5,\) is needed"),
        ((X, W, None, ONE, 2), {}, ValueError, r"input_range: .* \(2,\) for a static range and \(2, 4\) for a dynamic"),
        ((X, W, None, None, 2), {"inp_res": 254}, ValueError, "inp_res: got 254 without input_range; .* so pass one"),
        ((X, W, None, None, 2), {"out_noise": 0.1}, ValueError, "input_range: missing, .* or switch both off"),
        ((X, W, None, R, 2), {"out_bound": 1.0}, ValueError, "bound_wmax: missing, but out_bound is scaled by it"),
        ((X, W, None, R, 2), {"out_res": 254}, ValueError, "out_res: .* set out_bound > 0"),
        ((X, W, None, R, 2), {"out_noise": 0.1, "noise_wmax": WMAX}, ValueError, "seed: missing"),
        ((X, W, None, R, 2), {"noise_wmax": ONE}, ValueError, r"noise_wmax: .* allowed are \(2, 5\) and \(2, 1\)"),
        ((X, W, None, META, 2), {}, ValueError, "input_range: on meta, but x is on cpu; move both to one device"),
        (
            (X.half(), W.half(), None, R, 2),
            {"inp_res": 2**17},
            ValueError,
            r"inp_res: 131072 steps overflow float16; use",
        ),
        ((STEPS, INT8, None, R, 2), SCALED, TypeError, "x: got dtype torch.int8; allowed are float32"),
        ((X, INT8, None, R, 2), SCALED | {"weight_wmax": None}, ValueError, "weight_wmax: missing, but an int8 weight"),
        ((X, INT8, None, R, 2), SCALED | {"weight_wmax": ONE}, ValueError, r"weight_wmax: .* \(2, 5\) and \(2, 1\)"),
        (
            (X, INT8, None, R, 2),
            SCALED | {"weight_res": 256},
            ValueError,
            "weight_res: got 256; int8 holds at most 254",
        ),
        (
            (X, INT8, None, R, 2),
            SCALED | {"weight_res": 0},
            ValueError,
            "weight_res: got 0; .* 2 to 254 or the inverse",
        ),
        ((X, INT8, None, R, 2), SCALED | {"inp_res": 1 / 300}, ValueError, "inp_res: got .*; int8 holds at most 254"),
        ((X, INT8, None, R, 2), SCALED | {"inp_res": -1}, ValueError, "inp_res: got -1; int8 holds at most 254 steps"),
        ((X, INT8, None, None, 2), SCALED, ValueError, "inp_res: got 254 without input_range; .* so pass one"),
    ),
    *rows(
        ops.matmul_backward,
        ((G[:2], W, X, None, 2), {}, ValueError, r"grad: got shape \(2, 5\); 4 rows are needed, as x has"),
        ((G, W.half(), X, R, 2), {}, TypeError, "weight: dtype torch.float16, but grad is torch.float32; cast one"),
        ((G, W, X, ONE, 2), {}, ValueError, r"input_range: got shape \(1,\); allowed are"),
        (
            (G, W, X, R, 2, MASK[:1]),
            {},
            ValueError,
            r"mask: .* contiguous int32 tensor of shape \(2, 1, 4, 4\) is needed",
        ),
        ((G, W, X, R, 2), {"decay": -1.0}, ValueError, "decay: got -1.0; allowed is a finite number >= 0"),
        ((G, W, X, None, 2), {"inp_res": 254}, ValueError, "inp_res: got 254 without input_range"),
        ((G, W, STEPS, R, 2), {"inp_res": 254}, ValueError, r"clipped: got None; an int8 x .* uint8 flags"),
        (
            (G, W, STEPS, None, 2),
            {},
            ValueError,
            "inp_res: got -1.0, but x holds steps; give the converter's resolution",
        ),
    ),
    *rows(
        ops.matmul_dgrad,
        ((G[:2], W, X, None, 2), {}, ValueError, r"grad: got shape \(2, 5\); 4 rows are needed, as x has"),
        ((X, W, X, None, 2), {}, ValueError, r"grad: got shape \(4, 6\); 5 columns are needed"),
        ((G.half(), W, X, None, 2), {}, TypeError, "grad: dtype torch.float16, but x is torch.float32; cast one"),
        ((G, W, X, torch.ones(2, 4), 2), {}, ValueError, "input_range: .* one range per slice is needed"),
        (
            (G, W, X, R, 2, MASK[:1]),
            {},
            ValueError,
            r"mask: .* contiguous int32 tensor of shape \(2, 1, 4, 4\) is needed",
        ),
        (
            (G, W, X, R, 2, viewed(MASK.view(8, 4), "transposed").view(2, 1, 4, 4)),
            {},
            ValueError,
            "mask: .* contiguous",
        ),
        ((G, W, X, R, 2, MASK.float()), {}, ValueError, r"mask: got gradients of shape .* \(2, 4, 5\) is needed"),
        (
            (G, W, X, R, 2, G.half().expand(2, 4, 5)),
            {},
            TypeError,
            "mask: dtype torch.float16, but grad is torch.float32",
        ),
        ((G, W, X, R, 2, MASK.long()), {}, ValueError, "mask: got torch.int64"),
        ((G, W, X, R, 2), {"input_min_percentage": -0.1}, ValueError, "input_min_percentage: got -0.1; allowed is"),
        ((G, W.half(), X, R, 2), {}, TypeError, "weight: dtype torch.float16, but grad is torch.float32; cast one"),
        ((G, W, STEPS, R, 2), {}, ValueError, r"clipped: got None; an int8 x .* uint8 flags \(2, 4, 1\) of dac_steps"),
        ((G, W, STEPS, R, 2), {"clipped": FLAGS[:1]}, ValueError, r"clipped: got \(1, 4, 1\); an int8 x"),
        ((G, W, STEPS, R, 2), {"clipped": FLAGS.int()}, ValueError, "clipped: got .* needs the uint8 flags"),
        (
            (G, W, X, R, 2),
            {"needs_steps": True},
            ValueError,
            "needs_steps: asked for without .* give input_range and inp",
        ),
        (
            (G, W, X, None, 2),
            {"needs_steps": True, "inp_res": 254},
            ValueError,
            "needs_steps: asked for without an input converter",
        ),
    ),
    *rows(
        ops.matmul_wgrad,
        ((G[:2], X, None, 2), {}, ValueError, r"grad: got shape \(2, 5\); 4 rows are needed, as x has"),
        ((G, X, ONE, 2), {}, ValueError, r"input_range: got shape \(1,\); allowed are"),
        (
            (G, X, R, 2, MASK[:, :, :2]),
            {},
            ValueError,
            r"mask: got torch.int32 of shape \(2, 1, 2, 4\); a contiguous int32",
        ),
        ((G, X, R, 2), {"inp_res": float("nan")}, ValueError, "inp_res: got nan; allowed are"),
        ((G, X, R, 2), {"converted": True}, ValueError, "converted: x holds steps, but inp_res is -1.0; give the conv"),
        ((G, STEPS, R, 2), {"inp_res": 254}, TypeError, "x: got dtype torch.int8; allowed are float32"),
    ),
]


@pytest.mark.parametrize(("function", "error", "match"), ERRORS, ids=[match[:40] for _, _, match in ERRORS])
def test_errors_name_the_argument_and_the_remedy(function, error, match):
    with pytest.raises(error, match=match):
        function()
