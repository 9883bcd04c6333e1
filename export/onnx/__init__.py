# SPDX-License-Identifier: Apache-2.0
"""Students and vision towers of VLMs to ONNX graphs, checked against torch."""
