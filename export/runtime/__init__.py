# SPDX-License-Identifier: Apache-2.0
"""The ONNX runtime: an encoder, batching, zero-shot and search without torch."""
