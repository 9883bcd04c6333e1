# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: each module prints one JSON object and runs on a CPU or a GPU."""
