"""What the device can do: memory bandwidth of a large copy, and matrix products of random numbers.

python benchmarks/ceilings.py
"""

from __future__ import annotations

import argparse
import sys

import torch
from _measure import copy_bandwidth, product_flops
from _report import Results, Row, attempt, environment, table

COLUMNS = {"what": "what|s", "size": "size|d", "gb_s": "GB/s|.0f", "tflops": "TFLOP/s|.2f"}


def main(argv: list[str] | None = None) -> int:
    """Measure and report; 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--mib", type=int, default=2048 if on_gpu else 512, help="size of the copy")
    parser.add_argument("--product", type=int, default=8192 if on_gpu else 1024, help="rows of the matrices")
    parser.add_argument("--output", help="result file (JSON); by default one in benchmarks/results")
    args = parser.parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)

    def copy() -> Row:
        return {"gb_s": copy_bandwidth(device, args.mib) / 1e9}

    def product() -> Row:
        return {"tflops": product_flops(device, dtype, args.product) / 1e12}

    results = Results(f"ceilings_{device.type}", args.output, COLUMNS, environment(device, dtype))
    results.add(attempt({"what": "copy, read and written", "size": args.mib}, copy))
    results.add(attempt({"what": f"product, {args.dtype}", "size": args.product}, product))
    sys.stdout.write(f"{table(results.rows, COLUMNS)}\n\nwritten to {results.path}\n")
    return int(any("failed" in row for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
