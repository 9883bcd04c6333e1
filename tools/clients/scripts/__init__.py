# SPDX-License-Identifier: Apache-2.0
"""One script per client, run by `tools.clients.inside` in the client's environment; none imports this project."""
