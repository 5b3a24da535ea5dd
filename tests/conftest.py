"""Where the tests run: kernels in Triton's interpreter without a GPU, on the GPU with one; the reference on the CPU."""

import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # before Triton is imported, which reads both once
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"

import warnings
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import inexact_libm
import pytest

from triton_analog import launch
from triton_analog.launch import environment, lookup, store

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "torch's roots, exponentials and logarithms are a unit in the last place off now and then"
    parser.addoption("--inexact-libm", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    # Tests set one thing at a time, and few steps; what is said of that is the subject of test_effects.py.
    config.addinivalue_line("filterwarnings", "ignore::triton_analog.config.ConfigWarning")
    if config.getoption("--inexact-libm"):
        config.add_cleanup(inexact_libm.install())


class TorchGenerator:
    """Lets hypothesis put torch's generator in the same state before each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_GENERATOR = TorchGenerator()
hypothesis.register_random(TORCH_GENERATOR)
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    max_examples=15,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # the interpreter is too slow to shrink with
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(params=["reference", "kernel"])
def backend(request: pytest.FixtureRequest) -> str:
    """The test's operations run through this; both in turn."""
    return request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU if there is one, else the CPU; the reference is tested on the CPU."""
    on_cpu = "backend" in request.fixturenames and request.getfixturevalue("backend") == "reference"
    return torch.device("cuda" if HAS_GPU and not on_cpu else "cpu")


@pytest.fixture
def aihwkit() -> Any:
    """The package, for tests that need it; it warns while it is imported."""
    pytest.importorskip(
        "aihwkit", reason="aihwkit is an optional peer: pip install --only-binary :all: --no-deps aihwkit==1.1.0"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import aihwkit.nn
        import aihwkit.optim
        import aihwkit.simulator.configs
    return aihwkit


@pytest.fixture(autouse=True)
def _selected_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """The interpreter would make kernels the default on CPU tensors; tests that ask for no backend get the reference."""
    if "backend" in request.fixturenames:
        selected = launch.backend(request.getfixturevalue("backend"))
    else:
        selected = nullcontext() if HAS_GPU else launch.backend("reference")
    with selected:
        yield


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Each test draws its own numbers, the same ones in every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _poisoned_outputs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels write into tensors full of NaN (integers: the largest), so that what they leave out shows."""
    if "backend" not in request.fixturenames or request.getfixturevalue("backend") != "kernel":
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty and its kin then fill their memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The three folders where tuning files are looked for, empty; and the process as if nothing had been looked up."""
    folders = SimpleNamespace(own=tmp_path / "own", cache=tmp_path / "cache" / "tuning", shipped=tmp_path / "shipped")
    monkeypatch.setenv(environment.TUNING_DIR, str(folders.own))
    monkeypatch.delenv(environment.STRICT_TUNING, raising=False)
    monkeypatch.delenv(environment.AUTOTUNE, raising=False)
    monkeypatch.setattr(store, "user_cache_path", lambda name: tmp_path / "cache")
    monkeypatch.setattr(store, "shipped_directory", lambda: folders.shipped)
    lookup.forget()
    yield folders
    lookup.forget()
