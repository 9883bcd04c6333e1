# SPDX-License-Identifier: Apache-2.0
"""Models: towers, projectors, language models and adapters joined, saved and loaded."""
