# SPDX-License-Identifier: Apache-2.0
"""Estimates of the cost of a run before it starts."""

from aced_sdk.planning.plan import Plan, estimate

__all__ = ["Plan", "estimate"]
