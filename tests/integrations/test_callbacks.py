"""Missing libraries, and functions of the user that fail inside of a step."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
from material import SETTINGS, digit_batches, digit_model, needs
from torch.nn.functional import cross_entropy

from autodrop_ext import AutoDrop


@pytest.mark.parametrize("library", ["transformers", "lightning"])
def test_a_missing_library_names_its_extra(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = [library] if library == "transformers" else ["lightning.pytorch", "pytorch_lightning"]
    for name in (library, *hidden):
        monkeypatch.setitem(sys.modules, name, None)
    module = f"autodrop_ext.integrations.{library}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'autodrop_ext\[{library}\]'"):
        importlib.import_module(module)


@needs("sklearn")
@pytest.mark.filterwarnings(r"ignore:AutoDrop. step\(epoch=32\) sets last_epoch")
def test_a_call_that_fails_and_is_repeated_decides_once() -> None:
    """DeepSpeed swallows a TypeError in ``step()`` and calls it again with another argument."""
    seen = []

    def fails(decision: Any) -> None:
        seen.append(decision)
        raise TypeError("of the user's own")

    model = digit_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = AutoDrop(optimizer, **SETTINGS, on_reading=fails)
    for images, labels in digit_batches(40):
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        try:
            scheduler.step()
        except TypeError:
            scheduler.step(32)
    assert len(seen) == len(scheduler.history) == 40 // 5 - 2
    assert scheduler.meter.steps == 40
