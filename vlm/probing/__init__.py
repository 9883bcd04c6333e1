# SPDX-License-Identifier: Apache-2.0
"""Frozen encoders compared through a small decoder."""
