"""Choosing experts for tokens, moving tokens to those experts, sorted by expert, and their results back."""

from pallas_kernels.expert_dispatch.move import combine, dispatch, sum_rows
from pallas_kernels.expert_dispatch.plan import Plan, plan_dispatch
from pallas_kernels.expert_dispatch.route import Choice, top_k_route

__all__ = [
    "Choice",
    "Plan",
    "combine",
    "dispatch",
    "plan_dispatch",
    "sum_rows",
    "top_k_route",
]
