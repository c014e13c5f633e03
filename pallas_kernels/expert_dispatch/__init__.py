"""Moving tokens to the experts that they chose, sorted by expert, and their results back."""

from pallas_kernels.expert_dispatch.reference import combine_reference, dispatch_reference
from pallas_kernels.expert_dispatch.xla import Plan, combine, dispatch, plan_dispatch

__all__ = ["Plan", "combine", "combine_reference", "dispatch", "dispatch_reference", "plan_dispatch"]
