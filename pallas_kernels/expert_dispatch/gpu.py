"""Expert dispatch on GPUs: left to XLA, function by function, and why.

What moves rows is bound by memory, and XLA moves each row once: gathers are fused with the weights, with the sum over a
token's rows and with the products' sums, and nothing as wide as a row is kept between kernels. ``scripts/gpu_kernels``
compiles them for an H100 and reports what is kept. A kernel could save launches alone.
"""

from __future__ import annotations

from typing import Any

REASONS = {
    "select": "XLA chooses experts and counts them; its tables stay in the L2 cache",
    "gather": "XLA reads and writes each row once",
    "gather_sum": "XLA reads each row and writes each sum once",
    "gather_dot": "XLA reads each row once",
}


def why_not(function: str, *arrays: Any, **static: Any) -> str | None:
    """Why ``function`` has no kernel here."""
    return f"{REASONS[function]}; there is no kernel for GPUs that would move less"
