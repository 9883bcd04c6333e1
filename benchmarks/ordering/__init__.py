# SPDX-License-Identifier: Apache-2.0
"""Does the method order as published? Every row at equal effort, over redrawn pools, noise and references."""
