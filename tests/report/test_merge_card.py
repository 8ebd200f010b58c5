from __future__ import annotations

from dataclasses import replace

from huggingface_hub import ModelCard

from coldmerge.report.merge_card import MergeFacts, merge_card

FACTS = MergeFacts(
    name="merged",
    method="ties",
    paper="TIES-Merging (arXiv 2306.01708).",
    base="acme/base",
    inputs=["acme/one", "./two", "acme/three+acme/lora"],
    recipe="merge_method: ties\n",
    parameters=1234567,
    dtype="BF16",
    model_type="llama",
    notes=["two: a token is lacking."],
    version="0.1.0",
)


def test_a_card_names_what_was_merged_and_how() -> None:
    text = merge_card(FACTS)
    card = ModelCard(text)
    assert card.data.get("base_model") == ["acme/base", "acme/one"]
    assert card.data.get("tags") == ["coldmerge", "merge", "model-merging"]
    assert card.data.get("library_name") == "transformers"
    assert "1,234,567 parameters (BF16)" in card.text
    assert "- `./two`" in card.text
    assert "- two: a token is lacking." in card.text
    assert "```yaml\nmerge_method: ties\n```" in card.text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_a_card_without_hub_names_claims_no_base() -> None:
    card = ModelCard(merge_card(replace(FACTS, base=None, inputs=["./two"], model_type=None)))
    assert card.data.get("base_model") is None
    assert card.data.get("library_name") is None
    assert "Base:" not in card.text
    assert "1 input " in card.text


def test_a_plan_cannot_end_its_own_fence_or_a_name_its_own_line() -> None:
    recipe = "name: |\n  ```\n  # not a title\n"
    text = merge_card(replace(FACTS, recipe=recipe, inputs=["a`b\nc"], name="x\n# y"))
    assert f"````yaml\n{recipe}````" in text
    assert "- `a'b c`" in text
    assert "\n# y" not in text
