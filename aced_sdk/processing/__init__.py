# SPDX-License-Identifier: Apache-2.0
"""Preprocessing of pictures and texts, without a model."""
