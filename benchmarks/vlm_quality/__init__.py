# SPDX-License-Identifier: Apache-2.0
"""How good captioning and VQA models get on students of a demo: `python -m benchmarks.vlm_quality`."""
