"""docs/recipes.md and docs/integrations.md: every block runs as it stands, and drops a rate."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
import torch
from material import needs

import autodrop_ext
from autodrop_ext import AnytimeAutoDrop, AutoDrop, read_log

pytestmark = needs("sklearn")

DOCS = pathlib.Path(autodrop_ext.__file__).parent.parent / "docs"
RECIPES = DOCS / "recipes.md"

if not RECIPES.exists():
    pytest.skip("docs/ is not next to the installed package", allow_module_level=True)


def blocks(document: pathlib.Path) -> dict[str, list[str]]:
    """Blocks of Python by the heading they stand under; the first part's heading is empty."""
    parts = re.split(r"^## (.*)$", document.read_text(), flags=re.MULTILINE)
    headed = zip(["", *parts[1::2]], parts[::2], strict=True)
    found = {h: re.findall(r"```python\n(.*?)```", part, re.DOTALL) for h, part in headed}
    return {heading: code for heading, code in found.items() if code}


def run_recipe(heading: str) -> dict[str, Any]:
    torch.manual_seed(0)
    recipes = blocks(RECIPES)
    (first,), (code,) = recipes[""], recipes[heading]
    names: dict[str, Any] = {}
    exec(compile(first, str(RECIPES), "exec"), names)
    exec(compile(code, f"{RECIPES}: {heading}", "exec"), names)
    return names


def assert_dropped(scheduler: AutoDrop, readings: int = 40) -> None:
    """At the end of every window from the third on a reading, and among them a drop."""
    assert len(scheduler.history) >= readings
    assert all(decision.angle is not None for decision in scheduler.history)
    assert scheduler.num_drops >= 1
    assert scheduler.get_last_lr()[0] < float(scheduler.base_lrs[0])


def test_all_recipes_are_tested() -> None:
    tested = set(re.findall(r'run_recipe\("(.*?)"\)', pathlib.Path(__file__).read_text()))
    assert set(blocks(RECIPES)) == tested | {""}


def test_grad_scaler() -> None:
    names = run_recipe("Mixed precision with GradScaler")
    assert_dropped(names["scheduler"])
    assert names["scaler"].get_scale() > 1


def test_cuda_graphed_step() -> None:
    """Without a GPU only that it is Python; captures cannot be had there."""
    names = run_recipe("A CUDA-graphed step")
    assert callable(names["capture"])
    if torch.cuda.is_available():
        assert_dropped(names["scheduler"])
    else:
        assert "scheduler" not in names


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
@pytest.mark.parametrize(
    "backend",
    # inductor compiles C++ for half a minute; the tracing, which meets the hooks, is the same.
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],
)
def test_compiled(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_, step = torch.compile, AutoDrop.step
    compiled, graphs = [], []

    def chosen(function: Any) -> Any:
        compiled.append(compile_(function, backend=backend))
        return compiled[-1]

    def counted(scheduler: AutoDrop) -> None:
        readings = len(scheduler.history)
        step(scheduler)
        if len(scheduler.history) > readings:
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    monkeypatch.setattr(torch, "compile", chosen)
    monkeypatch.setattr(AutoDrop, "step", counted)
    torch._dynamo.reset()
    names = run_recipe("A compiled model, and a compiled optimizer step")
    assert len(compiled) == 2
    assert_dropped(names["scheduler"])
    assert isinstance(names["optimizer"].param_groups[0]["lr"], torch.Tensor)
    # A drop changes the rate's value, not the graph: nothing is compiled after the first windows.
    assert graphs[0] == graphs[-1]
    torch._dynamo.reset()


def test_averaged_model() -> None:
    names = run_recipe("Averaged weights")
    assert_dropped(names["scheduler"])
    pairs = zip(names["averaged"].parameters(), names["model"].parameters(), strict=True)
    assert not any(torch.equal(average, newest) for average, newest in pairs)


def test_chained_scheduler() -> None:
    names = run_recipe("Together with another schedule")
    scheduler = names["scheduler"]
    assert_dropped(scheduler, readings=220 // 5 - 2)
    expected = 0.1 * 0.95**scheduler.num_drops * 0.5
    # A product of at most twenty roundings.
    assert names["optimizer"].param_groups[0]["lr"] == pytest.approx(expected, rel=1e-14)


def test_several_optimizers() -> None:
    names = run_recipe("Several optimizers")
    first, second = names["schedulers"]
    assert_dropped(first)
    assert_dropped(second)
    assert [d.angle for d in first.history] != [d.angle for d in second.history]


@needs("peft")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # peft's imports
def test_lora() -> None:
    names = run_recipe("LoRA")
    scheduler = names["scheduler"]
    assert_dropped(scheduler)
    trainable = [p for p in names["model"].parameters() if p.requires_grad]
    elements = sum(p.numel() for p in trainable)
    assert elements == 4 * (64 + 32) + 4 * (32 + 10)
    # Three float64 tables of an element a bucket, and a row of the plan for each of four tensors.
    assert scheduler.meter.device_bytes <= 24 * elements + 4 * 64


def test_lbfgs() -> None:
    names = run_recipe("LBFGS")
    assert_dropped(names["scheduler"], readings=120 // 3 - 2)


@needs("tensorboard")
def test_logs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_recipe("Logs")
    assert_dropped(names["scheduler"])
    readings, metrics, _ = read_log("run.jsonl")
    assert [r["angle"] for r in readings] == [d.angle for d in names["scheduler"].history]
    assert [m["step"] for m in metrics] == list(range(10, 241, 10))
    assert list((tmp_path / "board").glob("events.*"))


# ---- docs/integrations.md -------------------------------------------------------------------


@pytest.fixture
def somewhere(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for the logs and checkpoints of the libraries, and a seed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def run_blocks(heading: str, count: int = 1) -> dict[str, Any]:
    """Run the first blocks under a heading, with the names that they define and no others."""
    names: dict[str, Any] = {}
    for code in blocks(DOCS / "integrations.md")[heading][:count]:
        exec(compile(code, f"integrations.md: {heading}", "exec"), names)
    return names


def test_all_integrations_are_tested() -> None:
    counts = {heading: len(code) for heading, code in blocks(DOCS / "integrations.md").items()}
    assert counts == {
        "transformers": 3,
        "accelerate": 1,
        "Lightning": 1,
        "Fabric": 1,
        "Closed loops": 1,
        "One scheduler for several optimizers": 1,
    }


@needs("transformers", "accelerate")
@pytest.mark.usefixtures("somewhere")
@pytest.mark.filterwarnings("ignore:'pin_memory'")  # Trainer's default, on a machine without a GPU
@pytest.mark.parametrize("count", [1, 2])
def test_transformers_blocks(count: int) -> None:
    assert_dropped(run_blocks("transformers", count)["trainer"].lr_scheduler)


@needs("transformers", "accelerate")
@pytest.mark.usefixtures("somewhere")
@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_transformers_average_block() -> None:
    names = run_blocks("transformers", 3)
    assert isinstance(names["trainer"].lr_scheduler, AnytimeAutoDrop)
    assert pathlib.Path("model/model.safetensors").exists()


@needs("accelerate")
@pytest.mark.usefixtures("somewhere")
def test_accelerate_block() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    names = run_blocks("accelerate")
    assert_dropped(names["scheduler"].scheduler, readings=120 // 5 - 2)
    AcceleratorState._reset_state(reset_partial_state=True)


@needs("lightning")
@pytest.mark.usefixtures("somewhere")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # its own
def test_lightning_block() -> None:
    assert_dropped(run_blocks("Lightning")["module"].scheduler)


@needs("lightning")
@pytest.mark.usefixtures("somewhere")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # its own
def test_fabric_block() -> None:
    assert_dropped(run_blocks("Fabric")["scheduler"])


@pytest.mark.usefixtures("somewhere")
def test_closed_loop_block() -> None:
    names = run_blocks("Closed loops")
    assert_dropped(names["scheduler"])
    assert names["scheduler"].history[-1].step == 240


@pytest.mark.usefixtures("somewhere")
def test_one_scheduler_for_several_optimizers_block() -> None:
    names = run_blocks("One scheduler for several optimizers")
    scheduler = names["scheduler"]
    assert_dropped(scheduler)
    shares = [
        names[name].param_groups[0]["lr"] / lr for name, lr in (("first", 0.05), ("second", 0.01))
    ]
    # A product and a quotient are rounded.
    assert shares[0] == pytest.approx(shares[1], rel=1e-14)
    assert shares[0] < 1
    assert len(scheduler.meter.named_parameters()) == 4
