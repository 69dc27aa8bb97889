"""Checkpoints: bit-exact resume in the middle of a window, and what may go wrong with a state."""

from __future__ import annotations

import io
import pathlib
import pickle
import subprocess
import sys
import textwrap
import threading
import warnings
from typing import Any

import pytest
import torch

from autodrop_ext import AngularVelocity, AnytimeAutoDrop, AutoDrop
from autodrop_ext.settings import ANYTIME

STEPS, SAVED_AT = 120, 47  # 47 is not at the end of a window of 4


class Run:
    """A small training run whose every part is in its checkpoint."""

    def __init__(self, seed: int = 0, optimizer: str = "SGD", window: int = 4, **settings: Any):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 3)
        ).to(memory_format=torch.channels_last)
        options = {"lr": 0.05} | ({"momentum": 0.9} if optimizer == "SGD" else {})
        self.optimizer = getattr(torch.optim, optimizer)(self.model.parameters(), **options)
        settings = {"factor": 0.5, "buffer_size": 3, "min_samples": 3} | settings
        self.scheduler = AutoDrop(self.optimizer, window, **settings)
        self.data = torch.Generator().manual_seed(1)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(8, 2, 4, 4, generator=self.data)
            loss = (self.model(x) - x.mean(dim=(1, 2, 3))[:, None]).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()

    def save(self) -> bytes:
        buffer = io.BytesIO()
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "data": self.data.get_state(),
            },
            buffer,
        )
        return buffer.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.data.set_state(state["data"])


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("saved_at", [1, 3, 4, 11, SAVED_AT, 48])
def test_resume_is_bit_exact(optimizer: str, saved_at: int) -> None:
    whole = Run(optimizer=optimizer)
    whole.train(saved_at)
    saved = whole.save()
    whole.train(STEPS - saved_at)
    assert whole.scheduler.num_drops > 1

    resumed = Run(seed=99, optimizer=optimizer)
    resumed.load(saved)
    resumed.train(STEPS - saved_at)
    assert resumed.scheduler.history == whole.scheduler.history
    assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
    assert resumed.scheduler.num_drops == whole.scheduler.num_drops


@pytest.mark.parametrize(
    "settings",
    [{}, {"buckets": None}, {"buckets": 4096}, {"buckets": 4096, "per_group": True}],
    ids=str,
)
@pytest.mark.parametrize("saved_at", [33, 34, 35])
def test_a_meter_resumes_bit_exactly(settings: dict[str, Any], saved_at: int) -> None:
    """In the middle of a window and at its end, exact and hashed."""
    x = torch.randn(5_000, generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    groups = [{"params": [x[:2_000]]}, {"params": [x[2_000:]]}]
    whole = AngularVelocity(groups, 5, **settings)
    resumed = None
    for step in range(60):
        x += 0.01 * torch.randn(5_000, generator=noise)
        if step == saved_at:
            resumed = AngularVelocity(groups, 5, **settings)
            resumed.load_state_dict(whole.state_dict())
        reading = whole.observe()
        if resumed is not None:
            assert resumed.observe() == reading
    assert resumed is not None and len(resumed.history) == 12 - saved_at // 5


def test_a_killed_process_resumes_bit_exactly(tmp_path: pathlib.Path) -> None:
    """Killed with SIGKILL in the middle of a window, resumed in another process.

    The run that nothing kills has a process to itself too: the last bits of the model's own
    gradients depend on the number of threads, which other tests in this process may have set.
    """
    checkpoint = tmp_path / "run.pt"
    script = textwrap.dedent(
        f"""
        import os, pathlib, signal, sys
        sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
        from test_state import Run, STEPS, SAVED_AT
        run, path = Run(), pathlib.Path({str(checkpoint)!r})
        if sys.argv[1:] == ["whole"]:
            run.train(STEPS)
        elif path.exists():
            run.load(path.read_bytes())
            run.train(STEPS - SAVED_AT)
        else:
            run.train(SAVED_AT)
            path.write_bytes(run.save())
            run.train(2)
            os.kill(os.getpid(), signal.SIGKILL)
        angles = [d.angle.hex() for d in run.scheduler.history if d.angle is not None]
        print(angles, run.scheduler.get_last_lr())
        """
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, capture_output=True, check=False)

    killed = run()
    assert killed.returncode == -9, killed.stderr.decode()
    resumed, whole = run(), run("whole")
    assert resumed.returncode == whole.returncode == 0, resumed.stderr + whole.stderr
    assert resumed.stdout == whole.stdout
    assert resumed.stdout.count(b"0x") > 3


def test_state_is_plain_and_aliases_nothing() -> None:
    run = Run()
    run.train(SAVED_AT)
    state = run.scheduler.state_dict()
    before = pickle.dumps(state)
    run.train(9)
    assert pickle.dumps(state) == before

    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert all(type(k) is str for k in value)
            for v in value.values():
                check(v)
        elif isinstance(value, list):
            for v in value:
                check(v)
        else:
            assert type(value) in (int, float, bool, str, type(None), torch.Tensor), type(value)

    check(state)


def test_nothing_is_put_into_the_optimizer() -> None:
    run = Run()
    run.train(9)
    keys = {key for state in run.optimizer.state.values() for key in state}
    assert keys == {"momentum_buffer"}
    assert set(run.optimizer.param_groups[0]) - {"initial_lr"} == set(
        torch.optim.SGD(run.model.parameters(), lr=1).param_groups[0]
    )


def test_state_before_the_first_step_and_between_load_and_step() -> None:
    fresh = Run()
    fresh.load(fresh.save())
    run = Run()
    run.train(SAVED_AT)
    saved = run.save()
    twice = Run(seed=5)
    twice.load(saved)
    again = Run(seed=6)
    again.load(twice.save())
    run.train(40)
    again.train(40)
    assert again.scheduler.history == run.scheduler.history


def test_an_optimizer_step_not_yet_consumed_is_kept() -> None:
    run = Run()
    run.train(3)
    run.optimizer.step()
    other = Run()
    other.load(run.save())
    run.scheduler.step()
    other.scheduler.step()
    assert other.scheduler.meter.windows == run.scheduler.meter.windows == 1


def test_settings_of_the_checkpoint_win_and_it_is_said() -> None:
    run = Run()
    run.train(20)
    other = Run(factor=0.9, threshold=0.5)
    with pytest.warns(RuntimeWarning, match=r"factor=0.5 \(was 0.9\), threshold=0.1 \(was 0.5\)"):
        other.load(run.save())
    assert other.scheduler.factor == 0.5


def test_a_state_without_tables_warms_up_again() -> None:
    run = Run()
    run.train(SAVED_AT)
    state = run.scheduler.state_dict()
    for name in ("running", "mean", "displacement"):
        state["meter"]["tables"][name] = None
    other = Run()
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    other.scheduler.load_state_dict(state)
    readings = len(other.scheduler.history)
    with pytest.warns(RuntimeWarning, match="it has no tables.*warms up again"):
        other.train(11)
    assert [d.angle for d in other.scheduler.history[readings:]] == [None, None]
    other.train(2)  # of the window at which it was saved, one step was left; then three whole ones
    assert other.scheduler.history[-1].angle is not None
    assert other.scheduler.num_drops == run.scheduler.num_drops


def as_version_1(state: dict[str, Any]) -> dict[str, Any]:
    """A meter's state as an earlier release wrote it, with sums in 4 bytes a parameter."""
    kept = ("window", "steps", "windows", "position", "usable", "still")
    arenas = dict.fromkeys(("running", "previous", "before"), torch.zeros(4))
    others = {"fresh": False, "variances": [], "form": "sum", "sample": None}
    return {"version": 1} | {k: state[k] for k in kept} | others | {"arenas": {"w": arenas}}


def test_a_state_of_version_1_gives_its_counts_and_warms_up_again() -> None:
    run = Run()
    run.train(SAVED_AT)
    state = run.scheduler.state_dict()
    state["meter"] = as_version_1(state["meter"])
    other = Run()
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an error then comes when everything is loaded
        with pytest.raises(RuntimeWarning, match=r"of an earlier release.*warms up again"):
            other.scheduler.load_state_dict(state)
    meter = other.scheduler.meter
    assert (meter.steps, meter.windows, meter.window) == (SAVED_AT, SAVED_AT // 4, 4)
    assert other.scheduler.history == run.scheduler.history
    assert other.scheduler.get_last_lr() == run.scheduler.get_last_lr()
    other.train(40)  # without another warning
    readings = other.scheduler.history[len(run.scheduler.history) :]
    assert [d.angle is None for d in readings] == [True] * 2 + [False] * (len(readings) - 2)
    assert meter.steps == SAVED_AT + 40


@pytest.mark.parametrize("saved_at", [4, 5])
def test_other_parameters_warm_up_again(saved_at: int) -> None:
    x, y = torch.randn(10), torch.randn(11)
    meter = AngularVelocity([x], 2)
    for _ in range(saved_at):
        meter.observe()
    reason = "saved for other parameters, or with other buckets"
    for tensors in ([y], [("z", x)], [x, y], [x.double()]):
        other = AngularVelocity(tensors, 2)
        other.load_state_dict(meter.state_dict())
        with pytest.warns(RuntimeWarning, match=reason) as caught:
            readings = [other.observe() for _ in range(6)]
        assert len([w for w in caught if reason in str(w.message)]) == 1
        assert all(r is None or r.angle is None for r in readings)
    other = AngularVelocity([x], 3)
    other.load_state_dict(meter.state_dict())
    assert other.window == 2


def test_other_buckets_warm_up_again() -> None:
    x = torch.randn(5_000)
    meter = AngularVelocity([x], 1, buckets=4096)
    for _ in range(5):
        meter.observe()
    for buckets in (8192, None):
        other = AngularVelocity([x], 1, buckets=buckets)
        other.load_state_dict(meter.state_dict())
        with pytest.warns(RuntimeWarning, match="other buckets.*warms up again"):
            other.observe()
        assert other.steps == 6


def test_a_bfloat16_model_does_not_continue_the_tables_of_a_float32_one() -> None:
    """The jump to rounded parameters would be taken for a displacement."""
    x = torch.randn(100)
    meter = AngularVelocity([x], 1)
    for _ in range(5):
        x += 0.1 * torch.randn(100)
        meter.observe()
    rounded = x.bfloat16()
    other = AngularVelocity([rounded], 1)
    other.load_state_dict(meter.state_dict())
    with pytest.warns(RuntimeWarning, match="warms up again and the next angle comes after 3"):
        angles = []
        for _ in range(3):
            rounded += (0.1 * torch.randn(100)).bfloat16()
            reading = other.observe()
            assert reading is not None
            angles.append(reading.angle)
    assert angles[:2] == [None, None] and angles[2] is not None
    assert other.windows == 8


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([1, 2], "^state_dict: expected a dict, got list"),
        (
            {},
            "^state_dict: expected what state_dict.. of AutoDrop returns, got a dict without",
        ),
        (
            {"version": 3, "scheduler": "AutoDrop"},
            r"^state_dict\['version'\]: expected 1 or 2, which this release reads, got 3",
        ),
        (
            {"version": 1, "scheduler": "StepLR"},
            r"^state_dict\['scheduler'\]: expected 'AutoDrop', got 'StepLR'",
        ),
        ({"version": 1, "scheduler": "AutoDrop"}, "^state_dict: no entry 'settings'"),
        ({"version": 2, "scheduler": "AutoDrop"}, "^state_dict: no entry 'window'"),
        ({"version": 1, "scheduler": "AutoDrop", "settings": {}}, r"^state_dict\['settings'\]: no"),
    ],
)
def test_a_wrong_state_changes_nothing(broken: Any, message: str) -> None:
    run = Run()
    run.train(SAVED_AT)
    twin = Run()
    twin.load(run.save())
    with pytest.raises(ValueError, match=message):
        twin.scheduler.load_state_dict(broken)
    run.train(30)
    twin.train(30)
    assert twin.scheduler.history == run.scheduler.history


def test_a_broken_meter_state_changes_nothing() -> None:
    run = Run()
    run.train(SAVED_AT)
    for key, value, expected in (
        ("position", "3", "expected an int, got '3'"),
        ("position", 4, "expected less than window=4"),
        ("tables", None, "expected a dict, got NoneType"),
        ("usable", -1, "expected at least 0, got -1"),
        ("spoiled", 1, "expected a bool, got 1"),
    ):
        state = run.scheduler.state_dict()
        state["meter"][key] = value
        twin = Run(factor=0.9)
        with pytest.raises(ValueError, match=rf"^state_dict\['meter'\]\['{key}'\]: {expected}"):
            twin.scheduler.load_state_dict(state)
        assert twin.scheduler.factor == 0.9
        assert twin.scheduler.meter.window == 4


def test_pickled_schedulers_go_on() -> None:
    run = Run()
    run.train(SAVED_AT)
    data = run.data.get_state()
    model, optimizer, scheduler = pickle.loads(
        pickle.dumps((run.model, run.optimizer, run.scheduler))
    )
    other = Run()
    other.model, other.optimizer, other.scheduler = model, optimizer, scheduler
    other.data.set_state(data)
    run.train(40)
    other.train(40)
    assert other.scheduler.history == run.scheduler.history


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("running", 5, "expected None or a dense float64 vector, got 5"),
        ("mean", torch.ones(4), "expected None or a dense float64 vector"),
        ("mean", torch.ones(2, 2).double(), "expected None or a dense float64 vector"),
        ("displacement", torch.ones(4).double().to("meta"), "expected None or a dense float64"),
        ("displacement", torch.eye(2).double().to_sparse(), "expected None or a dense float64"),
        ("layout", 3, "expected a string, got 3"),
        ("norms", 3, "expected a list, got 3"),
        ("norms", [-1.0], "expected a finite number of at least 0, got -1.0"),
        ("norms", [torch.nan], "expected a finite number of at least 0, got nan"),
    ],
)
def test_damaged_tables_are_refused(entry: str, value: object, message: str) -> None:
    x = torch.zeros(4)
    meter, twin = AngularVelocity([x], 2), AngularVelocity([x], 2)
    for t in range(5):
        x += torch.randn(4)
        assert meter.observe() == twin.observe(), t
    state = meter.state_dict()
    state["tables"][entry] = value
    with pytest.raises(ValueError, match=rf"^state_dict\['tables'\]\['{entry}'\].*{message}"):
        meter.load_state_dict(state)
    x += torch.randn(4)
    reading = meter.observe()
    assert reading == twin.observe() and reading is not None and reading.angle is not None


@pytest.mark.parametrize("missing", ["layout", "norms", "running", "mean", "displacement"])
def test_a_state_whose_tables_lack_an_entry_is_refused(missing: str) -> None:
    meter = AngularVelocity([torch.zeros(4)], 2)
    state = meter.state_dict()
    del state["tables"][missing]
    with pytest.raises(ValueError, match=rf"^state_dict\['tables'\]: no entry '{missing}'$"):
        meter.load_state_dict(state)


@pytest.mark.parametrize("name", ["running", "mean", "displacement"])
def test_tables_of_another_size_are_not_continued(name: str) -> None:
    x = torch.zeros(4)
    meter = AngularVelocity([x], 1)
    for _ in range(4):
        x += torch.randn(4)
        meter.observe()
    state = meter.state_dict()
    state["tables"][name] = torch.zeros(5, dtype=torch.float64)
    other = AngularVelocity([x], 1)
    other.load_state_dict(state)
    with pytest.warns(RuntimeWarning, match="its tables have another size.*warms up again"):
        reading = other.observe()
    assert reading is not None and reading.angle is None


def test_param_groups_that_cannot_decide_for_themselves_are_not_loaded() -> None:
    """params= has one group and the optimizer two, which the constructor refuses as well."""
    first, second = (torch.nn.Parameter(torch.randn(4)) for _ in range(2))

    def made(**settings: object) -> AutoDrop:
        optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=0.1)
        return AutoDrop(optimizer, window=2, **settings)  # type: ignore[arg-type]

    state = made(per_group=True).state_dict()
    other = made(params=[first, second])
    with pytest.raises(ValueError, match=r"per_group.*expected False, because params= has 1"):
        other.load_state_dict(state)
    assert not other.per_group


def test_a_state_of_version_1_had_the_number_of_cosines_under_another_name() -> None:
    def made() -> AnytimeAutoDrop:
        torch.manual_seed(0)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.randn(40))], lr=0.1)
        return AnytimeAutoDrop(optimizer, min_window=2, windows=2, cosines=5)

    def train(scheduler: AnytimeAutoDrop, steps: int) -> None:
        (parameter,) = scheduler.optimizer.param_groups[0]["params"]
        for _ in range(steps):
            parameter.grad = torch.randn(40)
            scheduler.optimizer.step()
            scheduler.step()

    scheduler = made()
    train(scheduler, 30)
    state = scheduler.state_dict()
    names = [s.name for s in ANYTIME if s.saved and s.name != "cosines"]
    settings = {name: state.pop(name) for name in names} | {"average": 8}
    del state["cosines"], state["mean"]
    state |= {"version": 1, "settings": settings, "meter": as_version_1(state["meter"])}
    other = made()
    other.optimizer.load_state_dict(scheduler.optimizer.state_dict())
    with pytest.warns(RuntimeWarning) as caught:
        other.load_state_dict(state)
    said = [str(w.message) for w in caught]
    assert sum("the meter warms up again" in message for message in said) == 1
    assert sum("the average over the run starts over" in message for message in said) == 1
    assert other.cosines == 8 and other.average is True
    assert (other.window, other.meter.steps) == (scheduler.window, 30)
    assert repr(other.history) == repr(scheduler.history)  # NaN does not equal itself
    train(other, 66)  # windows of 8 steps, and the first of 16 after a doubling
    assert any(d.angle is not None for d in other.history[len(scheduler.history) :])


@pytest.mark.parametrize("column", ["group_angles", "group_smoothed", "group_rises"])
@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 3])
def test_columns_of_groups_have_one_length(column: str, values: list[float]) -> None:
    def made() -> AutoDrop:
        parameters = [torch.nn.Parameter(torch.randn(5)) for _ in range(2)]
        groups = [{"params": [p]} for p in parameters]
        return AutoDrop(torch.optim.SGD(groups, lr=0.1), 1, per_group=True)

    scheduler = made()
    for _ in range(9):
        for group in scheduler.optimizer.param_groups:
            group["params"][0].grad = torch.randn(5)
        scheduler.optimizer.step()
        scheduler.step()
    state = scheduler.state_dict()
    made().load_state_dict(state)
    state["history"][column][3] = values
    with pytest.raises(ValueError, match=r"state_dict\['history'\]: expected equally many group_"):
        made().load_state_dict(state)


@pytest.mark.parametrize("digits", [19, 400])
@pytest.mark.parametrize(
    "entry", ["optimizer_steps", "last_epoch", "step_count", "window", "min_samples", "steps"]
)
def test_integers_of_any_length_are_refused(entry: str, digits: int) -> None:
    run = Run()
    run.train(20)
    state = run.scheduler.state_dict()
    (state["meter"] if entry == "steps" else state)[entry] = 10**digits
    with pytest.raises(ValueError, match=rf"\['{entry}'\]: expected less than 2\*\*63, got an int"):
        Run().scheduler.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:AutoDrop. the learning rates are:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:AutoDrop. the average over the run starts over:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("factor", 0.9), ("threshold", 3.0), ("min_lr", [0.01]), ("kernel", "time")),
        *(("buffer_size", 7), ("min_samples", 6), ("warmup_steps", 9), ("average", True)),
    ],
)
def test_settings_may_be_edited_in_a_state(name: str, value: Any) -> None:
    """As docs/troubleshooting.md says."""
    run = Run()
    run.train(40)
    state = {**run.scheduler.state_dict(), name: value}
    other = Run()
    with pytest.warns(RuntimeWarning, match=f"settings replace those given: .*{name}="):
        other.scheduler.load_state_dict(state)
    assert getattr(other.scheduler, name) == value
    other.train(12)


@pytest.mark.parametrize("stop", [1, 10, 15, 16, 63, 64, 74, 138])
def test_a_resume_before_the_first_snapshot_of_a_window(stop: int) -> None:
    run = Run(window=64, snapshots=4)
    run.train(stop)
    other = Run(seed=1, window=64, snapshots=4)
    other.load(run.save())
    for one in (run, other):
        one.train(280 - stop)
    assert repr(other.scheduler.history) == repr(run.scheduler.history)
    assert [d.step for d in run.scheduler.history] == [192, 256]


def test_states_that_another_thread_saves_are_of_whole_steps() -> None:
    run, undisturbed = Run(window=2), Run(window=2)
    states: list[dict[str, Any]] = []
    over = threading.Event()

    def save() -> None:
        while not over.wait(0.001):
            states.append(run.scheduler.state_dict())

    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    thread = threading.Thread(target=save)
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    try:
        thread.start()
        run.train(200)
        over.set()
        thread.join()
        undisturbed.train(200)
    finally:
        over.set()
        sys.setswitchinterval(interval)
        torch.set_num_threads(threads)
    history = undisturbed.scheduler.history
    assert repr(run.scheduler.history) == repr(history)
    assert len(states) > 10
    for state in states:
        steps, meter = state["optimizer_steps"], state["meter"]
        decided = [d for d in history if d.step <= steps]
        assert state["history"]["step"] == [d.step for d in decided]
        assert state["num_drops"] == sum(d.dropped for d in decided)
        assert meter["steps"] == steps
        assert meter["usable"] == meter["windows"] == steps // 2  # nothing was discarded
