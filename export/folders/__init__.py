# SPDX-License-Identifier: Apache-2.0
"""Students as folders of transformers, timm and transformers.js."""
