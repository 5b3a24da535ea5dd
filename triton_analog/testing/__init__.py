"""For the tests of whoever builds on this library: kernels held against their reference, at shapes of one's own."""

from triton_analog.testing.cases import OPERATIONS
from triton_analog.testing.compare import Comparison, assert_matches_reference, compare

__all__ = ["OPERATIONS", "Comparison", "assert_matches_reference", "compare"]
