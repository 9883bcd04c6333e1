# SPDX-License-Identifier: Apache-2.0
"""Saved models open with transformers and peft alone, under LLaVA's classic names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file
from test_vlm import Model, config, language, samples, student
from transformers import AutoTokenizer, LlamaForCausalLM

import vlm
from aced_sdk.errors import ModelError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return student(folder / "student"), language(folder / "language")


@pytest.fixture
def model(folders: tuple[Path, Path]) -> Model:
    return vlm.build(vision=folders[0], language=folders[1])


FRESH = """
import sys, json, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
base, adapter, picture = sys.argv[1:4]
if base:
    model, loading = AutoModelForImageTextToText.from_pretrained(base, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    if adapter:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, adapter)
else:  # the adapter names its base
    from peft import AutoPeftModel
    model = AutoPeftModel.from_pretrained(adapter)
processor = AutoProcessor.from_pretrained(base or "base")
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is it ?"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
batch = processor(images=[Image.open(picture)], text=[text], return_tensors="pt")
with torch.no_grad():
    logits = model.eval()(**batch).logits[0, -1]
assert not {"aced_sdk", "vlm"} & set(sys.modules)
print(json.dumps([type(processor).__name__, logits.tolist()]))
"""


def test_what_is_saved_opens_with_transformers_and_peft_alone(model: Model, tmp_path: Path) -> None:
    llava, processor = model
    result = vlm.tune(llava, processor, samples(), config(adapt=6), directory=tmp_path / "run")
    held_before = {name: value.clone() for name, value in llava.state_dict().items()}
    merged = vlm.save(result.model, processor, tmp_path / "merged")
    apart = vlm.save(result.model, processor, tmp_path / "apart", merge=False)
    assert all(torch.equal(llava.state_dict()[name], value) for name, value in held_before.items())
    image = samples()[0].images[0]
    image.save(tmp_path / "p.png")
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is it ?"}]}]
    batch = processor(
        images=[image], text=[processor.apply_chat_template(prompt, add_generation_prompt=True)], return_tensors="pt"
    )
    with torch.no_grad():
        expected = llava(**batch).logits[0, -1]
        untouched = vlm.load(apart / "base")[0](**batch).logits[0, -1]
    assert (expected - untouched).abs().max() > 1e-3
    for base, adapter in ((merged, ""), (apart / "base", apart / "adapter"), ("", "adapter")):
        done = subprocess.run(
            [sys.executable, "-c", FRESH, str(base), str(adapter), str(tmp_path / "p.png")],
            capture_output=True,
            text=True,
            check=False,
            cwd=apart,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        name, logits = json.loads(done.stdout.splitlines()[-1])
        assert name == "LlavaProcessor"
        torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-4, rtol=1e-4)
    for folder in (merged, apart):
        again, _ = vlm.load(folder)
        with torch.no_grad():
            torch.testing.assert_close(again(**batch).logits[0, -1], expected, atol=1e-4, rtol=1e-4)
        texts = [path for path in folder.rglob("*") if path.suffix in (".json", ".md", ".jinja")]
        assert not [path for path in texts if str(tmp_path) in path.read_text()]


def in_a_fresh_process(folder: Path, picture: Path) -> torch.Tensor:
    """Logits of the last place, computed by transformers alone."""
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder), "", str(picture)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.tensor(json.loads(done.stdout.splitlines()[-1])[1])


@pytest.mark.parametrize("tied", [True, False])
def test_keys_on_disk_are_the_classic_ones_and_open_bit_for_bit(
    folders: tuple[Path, Path], tmp_path: Path, tied: bool
) -> None:
    words = folders[1]
    if not tied:
        words = tmp_path / "untied"
        rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
        lm = LlamaForCausalLM.from_pretrained(folders[1], tie_word_embeddings=False, rope_parameters=rope)
        torch.nn.init.normal_(lm.lm_head.weight)
        lm.save_pretrained(words)
        AutoTokenizer.from_pretrained(folders[1]).save_pretrained(words)
    llava, processor = vlm.build(folders[0], words)
    saved = vlm.save(llava, processor, tmp_path / "saved")
    image = samples()[0].images[0]
    image.save(tmp_path / "p.png")
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is it ?"}]}]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    with torch.no_grad():
        expected = llava(**processor(images=[image], text=[text], return_tensors="pt")).logits[0, -1]

    classic = set(load_file(saved / "model.safetensors"))
    patterns = r"vision_tower\.vision_model\.(embeddings|pre_layrnorm|encoder\.layers\.\d|post_layernorm)\..+"
    patterns += r"|multi_modal_projector\.linear_[12]\.(weight|bias)"
    patterns += r"|language_model\.model\.(embed_tokens|layers\.\d|norm)\..+|language_model\.lm_head\.weight"
    assert [name for name in classic if not re.fullmatch(patterns, name)] == []
    assert ("language_model.lm_head.weight" in classic) is not tied
    torch.testing.assert_close(in_a_fresh_process(saved, tmp_path / "p.png"), expected, atol=1e-5, rtol=1e-5)

    # what transformers 4 reads beside them; version 4.46.3 was seen to give the same tokens, pixels and logits
    texts = json.loads((saved / "config.json").read_text())["text_config"]
    assert texts["rope_theta"] == (10_000 if tied else 5e5)
    assert ("rope_scaling" in texts) is not tied
    assert json.loads((saved / "preprocessor_config.json").read_text())["image_processor_type"] == "CLIPImageProcessor"
    assert json.loads((saved / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"

    # the other way: what transformers writes by itself opens here, and is saved under the classic names again
    llava.save_pretrained(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")
    assert set(load_file(tmp_path / "theirs" / "model.safetensors")) != classic
    again = vlm.save(*vlm.load(tmp_path / "theirs"), tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (saved, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_aligned_model_saves_without_adapters(model: Model, tmp_path: Path) -> None:
    llava, processor = model
    plan = vlm.TuneConfig(stages=[vlm.Align(steps=2, batch_size=4)])
    result = vlm.tune(llava, processor, samples(), plan, directory=tmp_path / "run")
    again, _ = vlm.load(vlm.save(result.model, processor, tmp_path / "saved"))
    for name, value in llava.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


# -- the card and the hub -----------------------------------------------------------------------------------------


def test_the_card_loads_the_model_and_shows_the_scores(model: Model, tmp_path: Path) -> None:
    llava, processor = model
    result = vlm.tune(llava, processor, samples(), config(adapt=6), directory=tmp_path / "run")
    scores = vlm.evaluate(result.model, processor, samples(), max_new_tokens=3)
    facts: dict[str, Any] = {"scores": scores, "license": "apache-2.0", "about": "Tuned on: six colours."}
    vlm.save(result.model, processor, tmp_path / "merged", **facts)
    vlm.save(result.model, processor, tmp_path / "apart", merge=False, **facts)
    samples()[0].images[0].save(tmp_path / "picture.png")
    (expected,) = vlm.answer(result.model, processor, [tmp_path / "picture.png"], ["What is this?"])
    for name, library in (("merged", "transformers"), ("apart", "peft")):
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(card.split("---\n")[1])
        assert front == {"library_name": library, "pipeline_tag": "image-text-to-text", "license": "apache-2.0"}
        assert f"| all | 12 | {scores.accuracy:.3f} ({scores.blind:.3f}) |" in card
        assert "| colour | 6 |" in card
        for words in ("Tuned on: six colours.", "`clip_vision_model`", "becomes 9 tokens", "`llama`, 2 layers"):
            assert words in card
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip() == expected


def test_a_card_without_facts_says_so(model: Model, tmp_path: Path) -> None:
    card = (vlm.save(*model, tmp_path / "bare") / "README.md").read_text(encoding="utf-8")
    assert "license" not in yaml.safe_load(card.split("---\n")[1])
    assert "| licence | not stated" in card
    assert "None were given." in card


class Hub:
    """Stands for huggingface_hub.HfApi: no repository is made in a test."""

    calls: list[dict[str, Any]]
    error: Exception | None

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if self.error:
            raise self.error
        self.calls.append({"repo_id": repo_id, **options})
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id.split('/')[-1]}")

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(options)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.calls, Hub.error = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def test_a_folder_goes_to_a_private_repository(model: Model, tmp_path: Path, hub: type[Hub]) -> None:
    folder = vlm.save(*model, tmp_path / "saved")
    assert vlm.push_to_hub(folder, "small") == "https://huggingface.co/me/small"
    made, sent = hub.calls
    assert made == {"repo_id": "small", "private": True, "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"]) == ("me/small", folder)  # the name that the hub completed
    vlm.push_to_hub(folder, "me/open", private=False)
    assert hub.calls[2]["private"] is False


def test_uploads_that_fail_say_what_to_do(model: Model, tmp_path: Path, hub: type[Hub]) -> None:
    folder = vlm.save(*model, tmp_path / "saved")
    refused = OSError("401 Client Error")
    refused.response = SimpleNamespace(status_code=401)  # type: ignore[attr-defined]
    for error, remedy in (
        (refused, "hf auth login"),
        (LocalTokenNotFoundError("no token"), "hf auth login"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (HFValidationError("a/b/c"), "user/name"),
    ):
        hub.error = error
        with pytest.raises(ModelError, match=remedy) as raised:
            vlm.push_to_hub(folder, "me/small")
        assert raised.value.field == "repo_id"
    with pytest.raises(ModelError, match="holds no model"):
        vlm.push_to_hub(tmp_path, "me/small")
    assert hub.calls == []


def test_the_real_client_without_a_network_is_refused_with_a_remedy(model: Model, tmp_path: Path) -> None:
    folder = vlm.save(*model, tmp_path / "saved")
    assert huggingface_hub.constants.HF_HUB_OFFLINE  # as all tests run
    with pytest.raises(ModelError) as raised:
        vlm.push_to_hub(folder, "me/small")
    assert "HF_HUB_OFFLINE" in raised.value.remedy or "hf auth login" in raised.value.remedy
