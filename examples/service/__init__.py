# SPDX-License-Identifier: Apache-2.0
"""A small HTTP service over an exported student: requests of many clients are batched. Start it as a module."""
