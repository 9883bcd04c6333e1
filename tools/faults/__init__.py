# SPDX-License-Identifier: Apache-2.0
"""Interrupt runs and resume them."""
