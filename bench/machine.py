"""Where a run took place, and what its machine can do at best."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

from bench.race import event_turn, host_turn

ROOT = Path(__file__).resolve().parents[1]


def git(*command: str) -> str:
    """What git prints; nothing where there is no repository or no git."""
    try:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def device_name(device: torch.device) -> str:
    """As a folder of results is called."""
    return torch.cuda.get_device_name(device).replace(" ", "_") if device.type == "cuda" else "cpu"


def environment(device: torch.device) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "revision": git("rev-parse", "--short", "HEAD") or None,
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measured here and now: a copy of a large buffer in GB/s (read and write), and a large matrix product in GFLOP/s."""
    on_gpu = device.type == "cuda"
    size, elements = (8192, 2**28) if on_gpu else (1536, 2**24)
    turn = event_turn if on_gpu else host_turn
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(elements, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    product, copy = turn(lambda: a @ b), turn(lambda: target.copy_(source))
    return {
        "copy_gb_s": 2 * source.nbytes / min(copy() for _ in range(9)) / 1e9,
        "matmul_gflop_s": 2 * size**3 / min(product() for _ in range(9)) / 1e9,
    }
