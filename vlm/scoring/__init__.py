# SPDX-License-Identifier: Apache-2.0
"""Scores of captions and answers."""
