# SPDX-License-Identifier: Apache-2.0
"""Conversations with pictures: readers, chat templates, rows of tokens."""
