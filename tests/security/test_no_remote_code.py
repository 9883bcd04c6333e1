# SPDX-License-Identifier: Apache-2.0
"""The source itself: no call that runs a model's code, unpickles, or reads YAML or pictures past the shared readers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("aced_sdk", "vlm", "export")

# Calls by their last name that must pass `trust_remote_code=False`. Left out, transformers asks on standard input.
# HFTokenizer of open_clip passes it on to AutoTokenizer; concrete classes of transformers accept it, too.
TRUSTING = {"from_pretrained", "from_config", "HFTokenizer", "SigLipTokenizer", "pipeline", "load_dataset"}

# Loaders of the same libraries that run no code of a model and take no such argument.
KNOWN = {
    "peft.PeftModel.from_pretrained": "builds a class of peft; an adapter has no code; safetensors come first",
    "tokenizers.Tokenizer.from_file": "parses JSON in Rust",
    "tokenizers.Tokenizer.from_str": "parses JSON in Rust",
    "tokenizers.Tokenizer.from_buffer": "parses JSON in Rust",
    "huggingface_hub.hf_hub_download": "fetches the one file that it names",
}

# Calls that need another argument, by their full name.
NEEDED = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
    "numpy.lib.npyio.NpzFile": ("allow_pickle", False),
    "numpy.lib.format.read_array": ("allow_pickle", False),
    "huggingface_hub.snapshot_download": ("allow_patterns", None),  # without it, pickles and code are fetched as well
    "PIL.Image.open": ("formats", None),
    "timm.create_model": ("pretrained", False),
}

# Calls that are not made at all, with what is called instead or what they would read.
FORBIDDEN = {
    "open_clip.create_model": "aced_sdk.towers.load",
    "open_clip.create_model_and_transforms": "aced_sdk.towers.load",
    "open_clip.create_model_from_pretrained": "aced_sdk.towers.load",
    "open_clip.get_tokenizer": "aced_sdk.towers.load: it passes a folder's tokenizer_kwargs on",
    "open_clip.load_checkpoint": "aced_sdk.towers.load",
    "open_clip.load_openai_model": "a TorchScript archive",
    "transformers.dynamic_module_utils.get_class_from_dynamic_module": "runs a repository's code",
    "peft.AutoPeftModel.from_pretrained": "loads the base model that an adapter names",
    "torch.jit.load": "code",
    "torch.hub.load": "code",
    "torch.hub.load_state_dict_from_url": "a pickle",
    "torch.package.PackageImporter": "code",
    "yaml.load": "aced_sdk.files.read_yaml",
    "yaml.load_all": "aced_sdk.files.read_yaml",
    "yaml.full_load": "aced_sdk.files.read_yaml",
    "yaml.unsafe_load": "aced_sdk.files.read_yaml",
    "yaml.safe_load": "aced_sdk.files.read_yaml: it expands aliases",
    "yaml.safe_load_all": "aced_sdk.files.read_yaml: it expands aliases",
    "eval": "code",
    "exec": "code",
    "compile": "code",
    "__import__": "code",
    "os.system": "a shell",
    "os.popen": "a shell",
}
PICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

# The one place of a call that is refused everywhere else, and why it may be there.
PLACES = {
    ("aced_sdk/files/reading.py", "yaml.load"): "with a SafeLoader, after aliases and tags were refused",
    ("export/folders/to_timm.py", "timm.create_model"): "loads the safetensors folder that it has just written",
}
PICTURES = "aced_sdk/processing/plain/"


def findings(source: str, file: str = "x.py") -> Iterator[str]:
    """What is wrong in a file, by line."""
    tree = ast.parse(source)
    names = imported(tree)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: imports {name}" for name in modules if name.split(".")[0] in PICKLING)
        elif isinstance(node, ast.Call):
            name = full_name(node.func, names)
            why = problem(name, {word.arg: word.value for word in node.keywords}, file)
            if why and (file, name) not in PLACES:
                yield f"{node.lineno}: {name} {why}"
        elif isinstance(node, ast.Attribute) and node.attr in TRUSTING and id(node) not in called:
            yield f"{node.lineno}: {node.attr} is passed on, so its arguments cannot be seen"


def problem(name: str, given: dict[str | None, ast.expr], file: str) -> str | None:
    """Why a call must not be made with these arguments."""
    if name in FORBIDDEN:
        return f"must not be called: {FORBIDDEN[name]}"
    if name in NEEDED:
        argument, value = NEEDED[name]
        found = given.get(argument)
        if found is None or (value is not None and not (isinstance(found, ast.Constant) and found.value is value)):
            return f"needs the argument {argument}" + ("" if value is None else f"={value}")
    if name == "PIL.Image.open" and not file.startswith(PICTURES):
        return "is called in aced_sdk.processing.plain alone"
    if name.split(".")[-1] in TRUSTING and name not in KNOWN:
        found = given.get("trust_remote_code")
        if not (isinstance(found, ast.Constant) and found.value is False):
            return "needs trust_remote_code=False"
    return None


def imported(tree: ast.AST) -> dict[str, str]:
    """Full names by the names that a file gives them, wherever it imports them."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    """`np.load` as `numpy.load`; open_clip's inner modules as open_clip; what is no plain name as `?`."""
    if isinstance(node, ast.Attribute):
        name = f"{full_name(node.value, names)}.{node.attr}"
    else:
        name = names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"
    for inner in ("open_clip.factory", "open_clip.tokenizer", "open_clip.openai", "timm.models"):
        name = name.replace(f"{inner}.", f"{inner.split('.')[0]}.")
    return name


def test_no_file_runs_code_or_reads_past_the_shared_readers(root: Path) -> None:
    found = [
        f"{path.relative_to(root)}:{line}"
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
        for line in findings(path.read_text(encoding="utf-8"), path.relative_to(root).as_posix())
    ]
    assert not found, "\n".join(found)


def test_every_exception_is_still_used(root: Path) -> None:
    for file, name in PLACES:
        source = (root / file).read_text(encoding="utf-8")
        tree = ast.parse(source)
        calls = [full_name(node.func, imported(tree)) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert name in calls, f"{file} calls {name} no more"


BAD = [
    "from transformers import AutoModel\nAutoModel.from_pretrained(x)",
    "from transformers import AutoModel\nAutoModel.from_pretrained(x, trust_remote_code=True)",
    "from transformers import AutoModel\nAutoModel.from_pretrained(x, trust_remote_code=trusted)",
    "from transformers import AutoModel\nAutoModel.from_pretrained(x, **{'trust_remote_code': False})",
    "from transformers import AutoModel\nload = AutoModel.from_pretrained",
    "MAPPING[kind].from_config(config)",
    "import open_clip.tokenizer as t\nt.HFTokenizer(name, **kwargs)",
    "import open_clip\nopen_clip.create_model_and_transforms(name)",
    "from open_clip.factory import load_checkpoint as read\nread(model, path)",
    "def f():\n    import torch as t\n    t.load(path)",
    "import torch\ntorch.load(path, weights_only=False)",
    "from torch import load\nload(path)",
    "import numpy as np\nnp.load(path)",
    "import numpy as np\nnp.load(path, allow_pickle=True)",
    "import pickle",
    "from joblib import load",
    "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
    "import yaml\nyaml.safe_load(text)",
    "from PIL import Image\nImage.open(path, formats=['PNG'])",
    "from huggingface_hub import snapshot_download\nsnapshot_download(name)",
    "import timm\ntimm.create_model(name, pretrained=True)",
    "from timm.models import create_model\ncreate_model('hf-hub:x')",
    "eval(text)",
]
GOOD = [
    "from transformers import AutoModel\nAutoModel.from_pretrained(x, trust_remote_code=False)",
    "from open_clip.tokenizer import HFTokenizer\nHFTokenizer(name, trust_remote_code=False, **kwargs)",
    "from peft import PeftModel\nPeftModel.from_pretrained(model, folder)",
    "from tokenizers import Tokenizer\nTokenizer.from_file(path)",
    "import torch\ntorch.load(path, weights_only=True)",
    "import numpy as np\nnp.load(path, mmap_mode='r', allow_pickle=False)",
    "import yaml\nyaml.safe_dump(values)",
    "from huggingface_hub import snapshot_download\nsnapshot_download(name, allow_patterns=patterns)",
    "import timm\ntimm.create_model(name, pretrained=False)",
    "model.eval()",
]


@pytest.mark.parametrize("source", BAD)
def test_what_is_found(source: str) -> None:
    assert len(list(findings(source))) == 1


@pytest.mark.parametrize("source", GOOD)
def test_what_is_not_found(source: str) -> None:
    assert not list(findings(source))
    assert not list(findings("from PIL import Image\nImage.open(path, formats=known)", f"{PICTURES}x.py"))
