# SPDX-License-Identifier: Apache-2.0
"""An exported dual encoder in a small process: onnxruntime, numpy, Pillow and tokenizers, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from aced_sdk.files import inside, printable
from aced_sdk.processing.plain import read_tokenizer
from aced_sdk.processing.plain.inputs import (
    MAX_CHARACTERS,
    Picture,
    at_least_one,
    check_lengths,
    picture_batches,
    text_batches,
)
from export.runtime.cleaning import clean_text
from export.runtime.errors import EncoderError, FolderError, InputError, folder_errors
from export.runtime.graph_file import check_graph_file
from export.runtime.manifest import (
    GEOMETRY,
    INPUTS,
    OUTPUTS,
    SHORT,
    TOKENIZER,
    check_files,
    needed_files,
    read_manifest,
)
from export.runtime.pictures import Geometry, prepare
from export.runtime.sessions import check_ends, known_providers, open_session, run_session, session_options

MAX_PIXELS = 89_478_485  # where Pillow itself begins to warn
MAX_BATCH = 256

Floats = NDArray[np.float32]


class OnnxEncoder:
    """Pictures and texts to embeddings, from a folder that `export.to_onnx` wrote.

    May be used from several threads at once; the last three arguments bound the memory of each call. On the CPU all
    graphs of a process together get at most three quarters of the memory of the machine or container. int8 graphs
    quantise activations per batch, so that their embeddings of a picture depend a little on the rest of its batch.

    Graphs with loops, functions or weights elsewhere are refused. Digests find damage and mix-ups: who can write the
    folder can write its digests too.

    Args:
        directory: the exported folder.
        precision: which graphs to run: "fp32", "fp16" or "int8", as exported.
        threads: threads of one call; None leaves it to onnxruntime.
        providers: onnxruntime execution providers in order of preference; None is the CPU.
        check: compare the files with the hashes of `export.json`.
        parts: which graphs to load, of "vision", "text", "both" and "patches"; None is every tower that was exported,
            and "both" or "patches" only where there is none.
        max_pixels: pictures with more pixels are refused before they are decoded.
        max_batch: no call of a graph has more rows; larger batches are split.
        max_characters: longer texts are refused.

    Raises:
        FolderError: if the folder is missing, altered, not what an export writes, or has no such precision or part.
        InputError: if an option cannot be used.
    """

    def __init__(
        self,
        directory: str | Path,
        precision: str = "fp32",
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        *,
        check: bool = True,
        parts: Sequence[str] | None = None,
        max_pixels: int = MAX_PIXELS,
        max_batch: int = MAX_BATCH,
        max_characters: int = MAX_CHARACTERS,
    ) -> None:
        at_least_one(max_pixels=max_pixels, max_batch=max_batch, max_characters=max_characters)
        folder = Path(directory)
        self._manifest = read_manifest(folder)
        self.precision = precision
        self.max_pixels, self.max_batch, self.max_characters = max_pixels, max_batch, max_characters
        graphs = {graph["part"]: graph for graph in self._manifest["graphs"] if graph["precision"] == precision}
        if not graphs:
            there = sorted({graph["precision"] for graph in self._manifest["graphs"]})
            raise FolderError(
                f"{folder} has no graphs of precision '{precision}'",
                remedy=f"take one of: {', '.join(there)}, or export it too",
                field="precision",
            )
        for part in parts or ():
            if part not in graphs:
                raise FolderError(
                    f"{folder} has no {part} graph of precision {precision}",
                    remedy=f"take from: {', '.join(graphs)}",
                    field="parts",
                )
        wanted_parts = parts or [part for part in graphs if part in ("vision", "text")] or list(graphs)
        graphs = {part: graph for part, graph in graphs.items() if part in wanted_parts}
        options = session_options(threads, precision)
        chosen = known_providers(providers)
        text = self._manifest["text"]
        wanted = needed_files(graphs.values())
        if check:
            check_files(folder, {name: self._manifest["files"].get(name, "") for name in wanted})
        with folder_errors():
            places = {name: inside(folder, name) for name in wanted}
        ends: dict[str, tuple[str | int, ...]] = {}
        if GEOMETRY in places:
            self.geometry = Geometry.read(places[GEOMETRY])
            size = self.geometry.height, self.geometry.width
            ends["pixel_values"] = (
                ("tensor(uint8)", *size, 3) if self.pixels == "uint8" else ("tensor(float)", 3, *size)
            )
        if TOKENIZER in places:
            self._cleaning: str = text["cleaning"]
            self._tokenizer = _tokenizer(places[TOKENIZER], text["context_length"])
            ends["input_ids"] = ("tensor(int64)", SHORT)
        self._sessions = {}
        for part, graph in graphs.items():
            check_graph_file(places[graph["file"]], graph.get("data"))
            # under its own name: its external weights are beside it
            self._sessions[part] = open_session(folder / graph["file"], options, chosen)
            check_ends(self._sessions[part], part, {name: ends[name] for name in INPUTS[part]}, OUTPUTS[part])

    @property
    def parts(self) -> tuple[str, ...]:
        """The graphs that are loaded."""
        return tuple(self._sessions)

    @property
    def source(self) -> str:
        """sha256 of the student's weights: embeddings are comparable where this is equal."""
        return str(self._manifest["source"]["weights_sha256"])

    @property
    def pixels(self) -> str:
        """What `preprocess` gives: "float32", or "uint8" where the graph normalises."""
        return str(self._manifest["pixels"])

    @property
    def embedding_dim(self) -> int:
        """D, the width of both embeddings."""
        return int(self._manifest["embedding_dim"])

    @property
    def scale(self) -> float:
        """The learned factor on cosine similarities."""
        return float(self._manifest["scale"])

    @property
    def bias(self) -> float:
        """The learned bias of the sigmoid loss; 0 where there is none."""
        return float(self._manifest["bias"])

    @property
    def graph_bias(self) -> float:
        """What the logits of the graph of both towers contain of `bias`: all of it for SigLIP's shape, else 0."""
        return float(self._manifest["graph_bias"])

    def encode_image(self, images: Picture | Iterable[Picture], batch_size: int = 32) -> Floats:
        """L2-normalised float32 [N, D].

        Args:
            images: PIL images, paths, encoded bytes, or uint8 arrays [H, W], [H, W, 3] or [H, W, 4]; one of them counts
                as a list of one. Transparency is laid on white; EXIF orientation is applied to TIFF alone.
            batch_size: at most so many pictures, and at most `max_batch`, are decoded and in memory at once.

        Raises:
            InputError: naming the picture that cannot be used.
            FolderError: if no vision graph was exported.
        """
        size = self._batch("vision", batch_size)
        batches = picture_batches(images, size)
        return self._joined([self.embed("vision", self.preprocess(batch, first)) for first, batch in batches])

    def encode_text(self, texts: str | Iterable[str], batch_size: int = 256) -> Floats:
        """L2-normalised float32 [N, D].

        Raises:
            InputError: if something is no text.
            FolderError: if no text graph was exported.
        """
        size = self._batch("text", batch_size)
        return self._joined([self.embed("text", self.tokenize(batch, n)) for n, batch in text_batches(texts, size)])

    def warm_up(self, batch_sizes: Sequence[int] = (1,)) -> None:
        """Run every graph once per batch size, so that the first request does not pay for memory and kernels."""
        for size in batch_sizes:
            if "vision" in self._sessions:
                self.encode_image([Image.new("RGB", (self.geometry.width, self.geometry.height))] * size, size)
            if "text" in self._sessions:
                self.encode_text([""] * size, size)

    def zero_shot(
        self, images: Sequence[Picture], classnames: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
    ) -> Floats:
        """Logits float32 [N, C]: scale * cosine + bias against `encode_classes`.

        The largest is the predicted class; a softmax over C gives probabilities (a sigmoid each after a sigmoid loss).
        `export.ZeroShot` keeps the classes for later calls.

        Args:
            images: as for `encode_image`.
            classnames: C names.
            templates: texts with `{}` or `{c}` where the name belongs.

        Raises:
            InputError: if there are no classes or a template has no place for the name.
        """
        classes = self.encode_classes(classnames, templates)
        return np.asarray(self.scale * (self.encode_image(images) @ classes.T) + self.bias, np.float32)

    def encode_classes(self, classnames: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)) -> Floats:
        """L2-normalised float32 [C, D]: of each class the mean of its text embeddings over the templates.

        Raises:
            InputError: if there are no classes or a template has no place for the name.
        """
        if not classnames or not templates:
            raise InputError("no class or no template was given", remedy="give one of each", field="classnames")
        for field, values in (("classnames", classnames), ("templates", templates)):
            if isinstance(values, str) or not all(isinstance(value, str) for value in values):
                raise InputError(f"{field} is no list of strings", remedy="give one", field=field)
        templates = [template.replace("{}", "{c}") for template in templates]  # as aced_sdk.evaluation reads them
        for template in templates:
            if "{c}" not in template:
                raise InputError(
                    f"the template {printable(repr(template))} has neither {{}} nor {{c}}",
                    remedy="write one of them where the class's name belongs",
                    field="templates",
                )
        prompts = [template.replace("{c}", name) for name in classnames for template in templates]
        each = self.encode_text(prompts).reshape(len(classnames), len(templates), -1)
        return _normalised(each.mean(axis=1))

    def preprocess(self, images: Sequence[Picture], first: int = 0) -> NDArray[Any]:
        """`pixel_values` of the graphs; `first` is the number of the first picture in messages.

        Returns:
            float32 [N, 3, H, W], or uint8 [N, H, W, 3] where the export has its normalisation in the graph.
        """
        self._reads("pixel_values", "vision")
        geometry = self.geometry
        pixels = np.empty((len(images), geometry.height, geometry.width, 3), np.uint8)
        for n, image in enumerate(images):
            pixels[n] = prepare(image, f"images[{first + n}]", geometry, self.max_pixels)
        return pixels if self.pixels == "uint8" else self.geometry.normalise(pixels)

    def tokenize(self, texts: Sequence[str], first: int = 0) -> NDArray[np.int64]:
        """`input_ids`, int64 [N, context_length]; `first` is the number of the first text in messages."""
        self._reads("input_ids", "text")
        for n, text in enumerate(texts):
            place = f"texts[{first + n}]"
            if not isinstance(text, str):
                raise InputError(f"{place} is a {type(text).__name__}", remedy="give strings", field=place)
        check_lengths(texts, self.max_characters, first, "shorten it, or give OnnxEncoder a larger max_characters")
        cleaned = [clean_text(text, self._cleaning) for text in texts]
        try:
            rows = [encoding.ids for encoding in self._tokenizer.encode_batch(cleaned)]
        except BaseException as error:
            raise _reason(error, EncoderError, "the tokenizer fails at these texts") from error
        return np.array(rows, np.int64).reshape(len(rows), self._manifest["text"]["context_length"])

    def run(self, part: str, inputs: NDArray[Any]) -> Floats:
        """The raw graph of one input: embeddings float32 [N, D] before normalisation, or patches [N, T, W].

        Args:
            part: "vision", "text" or "patches".
            inputs: what `preprocess` or `tokenize` gives, at most `max_batch` rows.

        Raises:
            EncoderError: as `outputs`.
        """
        self._graph(part)
        return self.outputs(part, {INPUTS[part][0]: inputs})[OUTPUTS[part][0]]

    def outputs(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Floats]:
        """Every output of a graph by name.

        Args:
            part: a loaded graph; "both" gives `image_embeds` and `text_embeds`, L2-normalised, `logits_per_image`
                (scale * cosine + `graph_bias`) and `logits_per_text`.
            inputs: `pixel_values`, `input_ids` or both, at most `max_batch` rows each.

        Raises:
            EncoderError: if onnxruntime cannot run it: a wrong shape, a missing input, no memory, no time (a minute
                for each row), or outputs of unexpected shapes.
        """
        session = self._graph(part)
        for rows in inputs.values():
            if len(rows) > self.max_batch:
                raise InputError(
                    f"a batch of {len(rows)} was given, the bound is {self.max_batch}",
                    remedy="split it, or give OnnxEncoder a larger max_batch",
                    field="inputs",
                )
        values = dict(zip(OUTPUTS[part], run_session(session, part, OUTPUTS[part], inputs), strict=True))
        pictures, texts = (len(inputs[name]) if name in inputs else 0 for name in ("pixel_values", "input_ids"))
        shapes = {
            "image_embeds": (pictures, self.embedding_dim),
            "text_embeds": (texts, self.embedding_dim),
            "logits_per_image": (pictures, texts),
            "logits_per_text": (texts, pictures),
        }
        for name, value in values.items():
            if value.shape != shapes.get(name, (pictures, *value.shape[1:3])):
                raise FolderError(
                    f"the {part} graph gives {name} of shape {list(value.shape)}, not what its folder says",
                    remedy="export the student again",
                )
        return values

    def embed(self, part: str, inputs: NDArray[Any]) -> Floats:
        """As `run`, L2-normalised.

        Raises:
            EncoderError: as `outputs`, or if the graph gives values that are not finite.
        """
        embeddings = _normalised(self.run(part, inputs))
        if not np.isfinite(embeddings).all():
            raise EncoderError(
                f"the {self.precision} {part} graph gives values that are not finite",
                remedy="take another precision, or export the student again",
            )
        return embeddings

    def _graph(self, part: str) -> Any:
        if part not in self._sessions:
            raise FolderError(
                f"this export has no {part} graph of precision {self.precision}",
                remedy=f"export with parts=('{part}', ...)",
                field="parts",
            )
        return self._sessions[part]

    def _reads(self, name: str, part: str) -> None:
        if not any(name in INPUTS[loaded] for loaded in self._sessions):
            self._graph(part)  # which is not there, and says so

    def _batch(self, part: str, batch_size: int) -> int:
        at_least_one(batch_size=batch_size)
        self._graph(part)
        return min(batch_size, self.max_batch)

    def _joined(self, parts: list[Floats]) -> Floats:
        return np.concatenate(parts) if parts else np.empty((0, self.embedding_dim), np.float32)


def _normalised(embeddings: Floats) -> Floats:
    norms = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    return np.asarray(embeddings / np.maximum(norms, 1e-12), np.float32)


def _tokenizer(path: Path, length: int) -> Tokenizer:
    with folder_errors():
        content = read_tokenizer(path, length)
    try:
        return Tokenizer.from_str(content)
    except BaseException as error:
        raise _reason(error, FolderError, f"{printable(path)} cannot be read") from error


def _reason(error: BaseException, kind: type[EncoderError], cause: str) -> BaseException:
    """The error to raise for one of tokenizers: it raises plain Exceptions, and panics that are no Exceptions."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return kind(f"{cause}: {printable(error)}", remedy="export the student again")
    return error
