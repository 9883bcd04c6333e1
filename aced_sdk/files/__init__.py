# SPDX-License-Identifier: Apache-2.0
"""Files and folders: written whole or not at all, read with bounds."""

from aced_sdk.files.digests import check_digests, file_digests
from aced_sdk.files.reading import (
    ReadError,
    check_links,
    expand,
    inside,
    open_regular,
    parse_json,
    parse_yaml,
    printable,
    read_bytes,
    read_json,
    read_lines,
    read_text,
    read_yaml,
)
from aced_sdk.files.writing import (
    alone,
    create,
    home,
    save_tensors,
    sha256,
    tensor_digest,
    whole_file,
    whole_folder,
    write_json,
)

__all__ = [
    "ReadError",
    "alone",
    "check_digests",
    "check_links",
    "create",
    "expand",
    "file_digests",
    "home",
    "inside",
    "open_regular",
    "parse_json",
    "parse_yaml",
    "printable",
    "read_bytes",
    "read_json",
    "read_lines",
    "read_text",
    "read_yaml",
    "save_tensors",
    "sha256",
    "tensor_digest",
    "whole_file",
    "whole_folder",
    "write_json",
]
