"""``python -m triton_analog.tuning inspect --target sm_90``: the compiler's numbers for every kernel, without a GPU."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch

from triton_analog.tuning.inspect import OPS, TARGETS, inspect

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m triton_analog.tuning", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser("inspect", help="compile and report")
    command.add_argument("--target", required=True, choices=TARGETS)
    command.add_argument("--op", choices=OPS, help="one operation instead of all")
    command.add_argument("--dtype", choices=DTYPES, default="bf16", help="storage dtype (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    options = parser.parse_args()

    reports = [
        report
        for op in ([options.op] if options.op else OPS)
        for report in inspect(op, options.target, DTYPES[options.dtype])
    ]
    if options.json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
        return
    print(f"{'kernel':<28}{'registers':>10}{'spilled':>9}{'shared':>9}{'tensor core':>13}{'instructions':>14}")
    for r in reports:
        numbers = (r.registers, r.spilled_bytes, r.shared_bytes, r.tensor_core_instructions, r.instructions)
        print(f"{r.kernel:<28}" + "".join(f"{n:>{w}}" for n, w in zip(numbers, (10, 9, 9, 13, 14), strict=True)))


if __name__ == "__main__":
    main()
