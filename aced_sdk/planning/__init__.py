# SPDX-License-Identifier: Apache-2.0
"""What a run will cost, before it starts."""

from aced_sdk.planning.plan import Plan, estimate

__all__ = ["Plan", "estimate"]
