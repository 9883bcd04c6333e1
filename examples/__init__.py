# SPDX-License-Identifier: Apache-2.0
"""Worked examples: a quickstart on real data that package registries carry, and launch files for a cluster."""
