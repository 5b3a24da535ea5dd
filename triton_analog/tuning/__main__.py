"""Configurations of the kernels: ``python -m triton_analog.tuning sweep | show | check | merge | inspect``."""

from __future__ import annotations

import sys
from importlib.util import find_spec

if __name__ == "__main__":
    if find_spec("rich") is None:
        sys.exit("error: this command needs the package rich; pip install 'triton-analog[tuning]'")
    from triton_analog.tuning.command import main

    sys.exit(main())
