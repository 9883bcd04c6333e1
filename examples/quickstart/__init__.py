# SPDX-License-Identifier: Apache-2.0
"""The quickstart: build the data box, distil a student from it, look at what it learned."""
