# SPDX-License-Identifier: Apache-2.0
"""Read files that somebody else wrote: regular files of bounded size and depth, inside the folder that names them.

Every reader of JSON, YAML, text or logs in this project goes through this module. It needs the standard library alone
(and PyYAML for YAML), so that the ONNX runtime can use it too.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, TypeVar

from aced_sdk.errors import AcedError

MIB = 2**20
MAX_JSON = 64 * MIB  # a tokenizer.json with a large vocabulary has about 35 MB
MAX_TEXT = 16 * MIB
MAX_YAML = MIB
MAX_LINE = 64 * MIB  # an event of a step with a large super-batch has several MB
MAX_HEADER = 8 * MIB  # of a safetensors file: about 80,000 tensors
MAX_DEPTH = 64  # of nested lists and mappings
_MAX_NAME = 4096  # characters of a path inside of a folder
_MAX_NODES = 500_000  # of a YAML file
_MAX_DIGITS = 40  # of an integer in YAML
_OTHER_BASE = re.compile(r"[-+]?(?:0[0-7_]+|[0-9][0-9_]*(?::[0-9]+)+)")  # octal by a zero in front, or base 60

_T = TypeVar("_T")
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


class ReadError(AcedError, ValueError):
    """A file that is missing, is not a regular file, is too large or too deeply nested, or cannot be parsed."""


def expand(path: str | Path) -> Path:
    """The path with `~` and `~user` expanded.

    Raises:
        ReadError: if the user is unknown, or the path holds a NUL byte or a character that no file name can have.
    """
    try:
        expanded = Path(path).expanduser()
        os.fsencode(expanded)  # no half of a surrogate pair, which JSON can hold
    except (RuntimeError, UnicodeError) as error:
        raise ReadError(f"{printable(path)} cannot be expanded: {error}", remedy="write the path in full") from None
    if "\0" in str(expanded):
        raise ReadError(f"the path {printable(path)} holds a NUL byte", remedy="correct the path")
    return expanded


def inside(folder: str | Path, name: str | Path) -> Path:
    """The resolved path of `name` in `folder`; it must stay in the folder, through links too.

    A folder in a snapshot of the Hugging Face cache may link to the `blobs` folder of the same repository.

    Raises:
        ReadError: if the name is absolute, has `..`, is too long, or a link leads outside.
    """
    remedy = "copy the file into the folder, or do not use this folder"
    if len(str(name)) > _MAX_NAME:
        raise ReadError(f"the file name {printable(name, 100)} is too long", remedy=remedy)
    relative = Path(name)
    if not str(name) or "\0" in str(name) or relative.is_absolute() or ".." in relative.parts:
        raise ReadError(f"{printable(name)} names a file outside of its folder", remedy=remedy)
    try:
        root = Path(folder).resolve()
        target = (root / relative).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL byte
        raise ReadError(
            f"{printable(name)} in {printable(folder)} cannot be resolved: {error}", remedy=remedy
        ) from None
    allowed = [root, *(place.parent / _BLOBS for place in root.parents if place.name == _SNAPSHOTS)]
    if not any(target.is_relative_to(place) for place in allowed):
        raise ReadError(
            f"{printable(name)} in {printable(folder)} is a link that leads out of the folder", remedy=remedy
        )
    return target


def check_links(folder: str | Path) -> None:
    """Refuse a folder that holds links out of it or files that are not regular: pipes, devices, sockets.

    Call it before a folder is passed to a library that follows links.

    Raises:
        ReadError: naming the first such file.
    """
    root = Path(folder)
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(directory, name)
            target = inside(root, path.relative_to(root))
            try:
                mode = target.stat().st_mode
            except OSError:
                continue  # a broken link: whoever needs the file says that it is missing
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ReadError(f"{printable(path)} is not a regular file", remedy="remove it from the folder")


def open_regular(path: str | Path, *, links: bool = True) -> BufferedReader:
    """Open a regular file for reading; never waits for a pipe or a device.

    Args:
        path: the file.
        links: False also refuses a symbolic link.

    Raises:
        ReadError: if it is missing, not readable, or not a regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    flags |= 0 if links else getattr(os, "O_NOFOLLOW", 0)
    try:
        handle = os.open(path, flags)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ReadError(f"cannot read {printable(path)}: {why}", remedy="check the path and its permissions") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ReadError(f"cannot read {printable(path)}: not a regular file", remedy="name a regular file")
    return BufferedReader(_Regular(handle, printable(path)))


class _Regular(FileIO):
    """An open file whose reading fails with a `ReadError`: over a broken disk, or where it would have to wait.

    Some files of the system say that they are regular, and are not.
    """

    def __init__(self, handle: int, shown: str) -> None:
        super().__init__(handle, "rb")
        self._shown = shown

    def readinto(self, buffer: Any, /) -> int:
        with self._named():
            count: int | None = super().readinto(buffer)
        return self._there(count)

    def readall(self) -> bytes:
        with self._named():
            content: bytes | None = super().readall()
        return self._there(content)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ReadError(f"cannot read {self._shown}: {error.strerror}", remedy="check the disk") from None

    def _there(self, found: _T | None) -> _T:
        if found is None:
            raise ReadError(f"cannot read {self._shown}: it would have to be waited for", remedy="name a regular file")
        return found


def stored_bytes(stream: BufferedReader) -> int:
    """Bytes of an open file that are on the disk, without holes; its size where the file system does not say."""
    facts = os.fstat(stream.fileno())
    if stored := 512 * getattr(facts, "st_blocks", 0):
        return min(stored, facts.st_size)
    if facts.st_size and hasattr(os, "SEEK_DATA"):
        try:
            os.lseek(stream.fileno(), 0, os.SEEK_DATA)
        except OSError as error:
            return 0 if error.errno == errno.ENXIO else facts.st_size  # ENXIO: nothing but a hole
        finally:
            stream.seek(0)
    return facts.st_size


def check_tensors(path: str | Path) -> None:
    """Refuse a safetensors file before its library opens it, which waits for pipes and fills the memory with headers.

    Raises:
        ReadError: if it is not a regular file, or its header has more than `MAX_HEADER` bytes.
    """
    with open_regular(path) as stream:
        size = int.from_bytes(stream.read(8), "little")
    if size > MAX_HEADER:
        raise ReadError(
            f"the header of {printable(path)} has more than {MAX_HEADER:,} bytes", remedy="restore the file"
        )


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        ReadError: if it cannot be read or is larger.
    """
    with open_regular(path) as stream:
        size = min(limit, os.fstat(stream.fileno()).st_size)
        content = stream.read(size + 1)  # Python reserves as much at once, so `limit` alone would be too much
        if len(content) > size:  # it has grown, or its file system does not say how large it is
            content += stream.read(limit - size)
    if len(content) > limit:
        raise ReadError(f"{printable(path)} has more than {limit:,} bytes", remedy="name a smaller file")
    return content


def read_text(path: str | Path, limit: int = MAX_TEXT) -> str:
    """The text of a UTF-8 file; a byte-order mark is dropped.

    Raises:
        ReadError: if it cannot be read, is larger than `limit` bytes, or is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ReadError(f"{printable(path)} is not UTF-8: {error.reason}", remedy="save it as UTF-8") from None


def parse_json(content: str | bytes, what: str, *, depth: int = MAX_DEPTH) -> Any:
    """The value of a JSON text nested at most `depth` deep.

    Args:
        content: the text.
        what: name of its origin, for the error.
        depth: levels of lists and objects.

    Raises:
        ReadError: if it is not JSON or is nested deeper.
    """
    remedy = "restore or correct the file"
    try:
        value = json.loads(content)
    except (RecursionError, MemoryError):
        raise ReadError(f"{printable(what)} is nested too deeply or too large", remedy=remedy) from None
    except ValueError as error:
        raise ReadError(f"{printable(what)} is not JSON: {printable(error)}", remedy=remedy) from None
    lists, mappings = ("[", "{") if isinstance(content, str) else (b"[", b"{")
    if content.count(lists) + content.count(mappings) > depth and _deeper(value, depth):  # type: ignore[arg-type]
        raise ReadError(f"{printable(what)} is nested more than {depth} levels deep", remedy=remedy)
    return value


def read_json(path: str | Path, limit: int = MAX_JSON, *, depth: int = MAX_DEPTH) -> Any:
    """The value of a JSON file.

    Raises:
        ReadError: if it cannot be read, is larger than `limit` bytes, is not JSON, or is nested deeper than `depth`.
    """
    return parse_json(read_text(path, limit), str(path), depth=depth)


def read_yaml(path: str | Path, limit: int = MAX_YAML) -> Any:
    """The value of a YAML file without anchors, aliases, tags or merges; dates stay text.

    A key occurs once in its mapping. Integers are decimal, or begin with `0x` or `0b`.

    Raises:
        ReadError: if it cannot be read, is larger than `limit` bytes, or is not such YAML.
    """
    return parse_yaml(read_text(path, limit), str(path))


def parse_yaml(content: str, what: str) -> Any:
    """As `read_yaml`, of a text whose origin is `what`.

    Raises:
        ReadError: as `read_yaml`.
    """
    import yaml

    remedy = "write plain YAML: mappings, lists, texts and numbers, without anchors and tags"
    try:
        depth = 0
        loader = _plain_loader()
        for number, event in enumerate(yaml.parse(content, Loader=loader)):
            if number > _MAX_NODES:
                raise ReadError(f"{printable(what)} has more than {_MAX_NODES:,} values", remedy=remedy)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise ReadError(f"{printable(what)} uses YAML anchors, aliases or tags", remedy=remedy)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ReadError(f"{printable(what)} is nested more than {MAX_DEPTH} levels deep", remedy=remedy)
        return yaml.load(content, Loader=loader)  # a SafeLoader with fewer types
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        if isinstance(error, ReadError):
            raise
        why = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())  # PyYAML breaks lines
        mark = getattr(error, "problem_mark", None)
        if mark is not None and "\t" in "".join(content.split("\n")[mark.line : mark.line + 1])[: mark.column + 1]:
            remedy = "indent with spaces, not with tabs"
        raise ReadError(f"{printable(what)} is not YAML: {printable(why)}", remedy=remedy) from None


def _plain_loader() -> Any:
    """PyYAML's SafeLoader, without dates and with bounded integers."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # twenty times as fast, where libyaml is there

    class Plain(base):  # type: ignore[misc]
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
            for first, pairs in base.yaml_implicit_resolvers.items()
        }

        def construct_yaml_int(self, node: Any) -> int:
            if len(node.value) > _MAX_DIGITS:
                raise ValueError(f"an integer has {len(node.value)} digits")
            if _OTHER_BASE.fullmatch(node.value):
                raise ValueError(f"YAML 1.1 reads {node.value} as another number: write a decimal one, or quote it")
            return int(super().construct_yaml_int(node))

        def construct_yaml_float(self, node: Any) -> float:
            if ":" in node.value:
                raise ValueError(f"YAML 1.1 reads {node.value} in base 60: write a decimal number, or quote it")
            return float(super().construct_yaml_float(node))

        def flatten_mapping(self, node: Any) -> None:
            """Refuse a repeated key, of which the last would count, and the merge key `<<`."""
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for (tag, name), count in Counter(keys).items():
                if count > 1 or tag == "tag:yaml.org,2002:merge":
                    why = "merges are not taken" if count == 1 else "the key stands more than once"
                    raise ValueError(f"{name}: {why}")

    Plain.add_constructor("tag:yaml.org,2002:int", Plain.construct_yaml_int)
    Plain.add_constructor("tag:yaml.org,2002:float", Plain.construct_yaml_float)
    return Plain


def read_lines(path: str | Path, limit: int = MAX_LINE) -> Iterator[bytes]:
    """The whole lines of a regular file, without their newline; a last line without one is left out.

    Raises:
        ReadError: if it cannot be read, or a line has more than `limit` bytes.
    """
    with open_regular(path) as stream:
        number = 0
        while line := stream.readline(limit + 1):
            number += 1
            if not line.endswith(b"\n"):
                if len(line) > limit:
                    raise ReadError(
                        f"line {number} of {printable(path)} has more than {limit:,} bytes", remedy="remove the line"
                    )
                return
            yield line[:-1]


def printable(value: object, length: int = 500) -> str:
    """A name or message from a file, for a terminal: control characters are escaped, and it is cut to `length`."""
    text = str(value)
    text = text if len(text) <= length else text[: length - 1] + "…"
    if text.isprintable():  # nearly always, and much faster
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def one_line(value: object, length: int = 100) -> str:
    """As `printable`, for a name: line breaks are escaped too."""
    return printable(value, length).replace("\n", "\\n")


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and mappings are nested more than `depth` levels deep."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(depth):
        if not level:
            return False
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, list | dict)
        ]
    return bool(level)
