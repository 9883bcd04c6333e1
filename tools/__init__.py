# SPDX-License-Identifier: Apache-2.0
"""Programs for the developers of this project; not part of the distribution."""
