# SPDX-License-Identifier: Apache-2.0
"""Outside clients on this project's artefacts, each in an environment of its own."""
