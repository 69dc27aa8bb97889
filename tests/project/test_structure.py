"""What the house forbids, read off imports and names, and that every rule notices a break.

A rule is a function from the sources to the places that break it, so that the same rule is asked
about the package as it is, which must be clean, and about sources into which a break was written.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Callable, Iterator, Mapping

import pytest

import autodrop_ext

PACKAGE = pathlib.Path(autodrop_ext.__file__).parent

Sources = Mapping[str, str]  # of modules by dotted name below the package; "" is the package itself


def sources() -> dict[str, str]:
    """The package as it is, without the kernels, which are installed into it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "triton_kernels":
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path.read_text(encoding="utf-8")
    return found


def in_room(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


# ---- imports ----------------------------------------------------------------------------------


def imports(module: str, given: Sources) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything of the package that a module imports, wherever it does.

    ``from .rooms import name`` is ``rooms.name`` if that is a module, and ``rooms`` otherwise.
    """
    is_package = any(other.startswith(f"{module}.") for other in given) or module == ""
    for node in ast.walk(ast.parse(given[module])):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                parents = module.split(".") if module else []
                keep = len(parents) - node.level + is_package
                assert keep >= 0, f"{module}:{node.lineno} leaves the package"
                base = ".".join([*parents[:keep], *(node.module or "").split(".")]).strip(".")
            elif (node.module or "").split(".")[0] == "autodrop_ext":
                base = (node.module or "").partition(".")[2]
            else:
                continue
            for alias in node.names:
                name = f"{base}.{alias.name}".strip(".")
                known = name in given or name in ("_C", "triton_kernels")
                yield node.lineno, name if known else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "autodrop_ext":
                    yield node.lineno, alias.name.partition(".")[2]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else ""
            if name.split(".")[0] == "autodrop_ext":
                yield node.lineno, name.partition(".")[2]


def forbidden(given: Sources, room: str, allowed: Callable[[str], bool]) -> list[str]:
    """Imports of a room's modules from outside of it that are not allowed."""
    return [
        f"{module}:{line} imports {name or 'the package'}"
        for module in given
        if in_room(module, room)
        for line, name in imports(module, given)
        if not in_room(name, room) and not allowed(name)
    ]


def operations_import_nothing_of_the_package(given: Sources) -> list[str]:
    return forbidden(given, "ops", lambda name: name in ("_C", "triton_kernels", "global_index"))


def schedulers_never_import_operations(given: Sources) -> list[str]:
    return forbidden(given, "schedulers", lambda name: not in_room(name, "ops"))


def checks_import_nothing(given: Sources) -> list[str]:
    return forbidden(given, "checks", lambda name: False)


ARROWS = {
    "checks": "",
    "messages": "",
    "memory": "",
    "global_index": "",
    "agreement": "",
    "windows": "",
    "saved": "checks",
    "settings": "checks saved",
    "reading": "checks saved",
    "log": "messages reading",
    "velocity_model": "checks",
    "sharding": "global_index memory",
    "parameters": "memory sharding",
    "average": "checks saved sharding",
    "sketch": "checks ops ops.plan reading saved sharding",
    "ranks": "agreement checks sharding",
    "faults": "messages ranks sketch",
    "meter": "agreement checks faults memory messages ops parameters ranks reading saved settings "
    "sharding sketch windows",
}
"""What each file of the meter may import: the seams between parameters, tables and ranks."""


def files_of_the_meter_import_what_the_house_says(given: Sources) -> list[str]:
    found = [f"no file {module}" for module in ARROWS if module not in given]
    found += [f"no arrows of {m}" for m in given if m and "." not in m and _is_file(m, given, m)]
    for module, allowed in ARROWS.items():
        found += forbidden(given, module, lambda name, allowed=allowed: name in allowed.split())
    return found


def _is_file(module: str, given: Sources, name: str) -> bool:
    """Return True for a file at the package's top level that has no arrows."""
    folder = any(other.startswith(f"{module}.") for other in given)
    return not folder and not name.startswith("__") and module not in ARROWS


def nothing_is_imported_in_a_circle(given: Sources) -> list[str]:
    """Also not through imports inside of functions, or for annotations only."""
    arrows = {m: {name for _, name in imports(m, given) if name in given} for m in given}
    state = dict.fromkeys(given, "new")
    circles: list[str] = []

    def follow(module: str, path: tuple[str, ...]) -> None:
        state[module] = "open"
        for other in sorted(arrows[module]):
            if state[other] == "open":
                circle = (*path, module)[(*path, module).index(other) :]
                circles.append(" -> ".join((*circle, other)))
            elif state[other] == "new":
                follow(other, (*path, module))
        state[module] = "done"

    for module in given:
        if state[module] == "new":
            follow(module, ())
    return circles


# ---- names ------------------------------------------------------------------------------------

OTHERS_UNDERSCORES = {
    # Of Python.
    "_replace": "NamedTuple",
    "_asdict": "NamedTuple",
    "_getframe": "sys: the line of the user that a warning points to",
    # Of torch, which has no public name for them.
    "_C": "torch's own extension: DisableTorchFunction",
    "_version": "Tensor: whether a learning rate was written to",
    "_foreach_copy_": "torch's multi-tensor operations",
    "_foreach_lerp_": "torch's multi-tensor operations",
    "_foreach_norm": "torch's multi-tensor operations",
    "_optimizer_step_pre_hooks": "Optimizer: whether a copy has lost its hooks",
    "_optimizer_step_post_hooks": "Optimizer: whether a copy has lost its hooks",
    "_wrapped_by_lr_sched": "optimizer.step: keeps torch's base class from wrapping it",
    "_update_lr": "LRScheduler: what SequentialLR calls at a milestone",
    "_schedulers": "SequentialLR and ChainedScheduler: the schedulers inside",
    "_local_tensor": "DTensor: its part on this rank, in a tenth of the time of to_local()",
    "_device_types": "ProcessGroup: where its tensors must be",
    "_get_root_mesh": "DeviceMesh: the mesh that a mesh was cut out of",
    "_mesh_resources": "DeviceMesh: the same before torch 2.9",
    # Of engines and trainers.
    "_params": "FSDP1's FlatParameter",
    "_fsdp_flattened": "FSDP1's FlatParameter",
    "_numels": "FSDP1's FlatParameter",
    "_shard_numel_padded": "FSDP1's FlatParameter",
    "_created_lr_scheduler": "transformers' Trainer: whether the scheduler is its own",
}
"""Underscore names that belong to others, and what they are needed for."""


def private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def nobody_reads_anothers_underscore_names(given: Sources) -> list[str]:
    found = []
    for module in given:
        for node in ast.walk(ast.parse(given[module])):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                if owner not in ("self", "cls", "super()"):
                    names = [node.attr]
            elif isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names if alias.name != "_C"]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr"):
                # getattr, setattr, hasattr, delattr
                owner = ast.unparse(node.args[0]) if node.args else ""
                constants = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
                names = [n for n in constants if isinstance(n, str) and owner != "self"]
            found += [
                f"{module}:{node.lineno} {ast.unparse(node)[:60]}"
                for name in names
                if private(name) and name not in OTHERS_UNDERSCORES
            ]
    return found


def every_allowed_underscore_is_used(given: Sources) -> list[str]:
    everything = "\n".join(given.values())
    return [name for name in OTHERS_UNDERSCORES if name not in everything]


# ---- tests -------------------------------------------------------------------------------------

TESTS = pathlib.Path(__file__).parents[1]
NAMED_BY_TESTS = {
    "_get_closed_form_lr": "torch's LRScheduler: what SequentialLR asks for",
    "_schedulers": "SequentialLR's: no scheduler here may look like one",
    "_update_lr": "torch's LRScheduler",
    "_best": "the choice of backends is remembered, and a test has to forget it",
}


def sources_of_tests() -> dict[str, str]:
    """Of the tests; those of benchmarks look into classes of benchmarks."""
    paths = (p for p in sorted(TESTS.rglob("*.py")) if p != pathlib.Path(__file__))
    names = {str(path.relative_to(TESTS)): path for path in paths}
    return {n: p.read_text(encoding="utf-8") for n, p in names.items() if "benchmarks" not in n}


def private_names_of(given: Sources) -> set[str]:
    """Underscore names that the package defines: functions, classes, attributes, constants."""
    names = set()
    for source in given.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return {name for name in names if private(name)} - {"_"}


def private_names_read(tests: Sources, names: set[str]) -> list[str]:
    """Where tests access, import or patch some of the names."""
    found = []
    for path, source in tests.items():
        for node in ast.walk(ast.parse(source)):
            named: list[str] = []
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
                named = [node.attr]
            elif isinstance(node, ast.ImportFrom) and "autodrop_ext" in (node.module or ""):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = [node.value.rpartition(".")[2]]
            bad = [name for name in named if name in names]
            found += [f"{path}:{node.lineno} {ast.unparse(node)[:60]}" for _ in bad]
    return found


def test_tests_use_public_names() -> None:
    names = private_names_of(sources()) - set(NAMED_BY_TESTS)
    assert {"_sketch", "_close_window", "_STILL_WINDOWS"} <= names
    assert private_names_read(sources_of_tests(), names) == []


@pytest.mark.parametrize(
    "line",
    [
        "assert meter._sketch is not None",
        "from autodrop_ext.messages import _warn",
        "monkeypatch.setattr(meter, '_close_window', None)",
        "monkeypatch.setattr('autodrop_ext.faults._STILL_WINDOWS', 2)",
    ],
)
def test_private_names_in_tests_are_noticed(line: str) -> None:
    names = private_names_of(sources())
    assert private_names_read({"test_x.py": "x = 1\n" + line}, names) != []


# ---- next to the package ---------------------------------------------------------------------

MAY_NOT_IMPORT = {
    "autodrop_ext": {"demo", "papers", "training"},
    "examples/demo": {"papers", "training"},
    "benchmarks/training": {"papers"},
    "benchmarks/papers/theory": {"training"},
}
"""Folders, and packages next to ``autodrop_ext`` that are above them."""


def packages_imported(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("folder", MAY_NOT_IMPORT)
def test_folders_import_downwards(folder: str) -> None:
    modules = sorted((TESTS.parent / folder).rglob("*.py"))
    if not modules:
        pytest.skip(f"{folder} is not next to the tests")
    for module in modules:
        above = packages_imported(module.read_text(encoding="utf-8")) & MAY_NOT_IMPORT[folder]
        assert not above, module


def test_imported_packages_are_found_wherever_they_are() -> None:
    source = "def f():\n    from papers.tasks import MODELS\nimport training.loop as loop"
    assert packages_imported(source + "\nfrom .papers import x") == {"papers", "training"}


# ---- ranks ------------------------------------------------------------------------------------


def function_of(source: str, owner: str, name: str) -> ast.FunctionDef:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and member.name == name:
                    return member
    raise AssertionError(f"no {owner}.{name}")


def leaves_early(statements: list[ast.stmt], collective: str) -> list[int] | None:
    """Lines before the call of the collective that may leave the function; None without a call.

    ``assert x is not None`` is for the type checker. What a process alone does, without a
    collective, is no concern of ranks.
    """
    lines: list[int] = []
    for statement in statements:
        test = ast.unparse(statement.test) if isinstance(statement, ast.If) else ""
        alone = test == "self.group is None"
        narrowing = isinstance(statement, ast.Assert) and ast.unparse(statement.test).endswith(
            " is not None"
        )
        if alone or narrowing:
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == collective:
                return lines
        lines += [
            node.lineno
            for node in ast.walk(statement)
            if isinstance(node, (ast.Return, ast.Raise, ast.Assert, ast.Yield, ast.YieldFrom))
        ]
    return None


def nothing_leaves_before_the_collective(given: Sources) -> list[str]:
    found = []
    for module, owner, name, collective in (
        ("meter", "AngularVelocity", "_close_window", "ranks.agree"),
        ("ranks", "Ranks", "agree", "self.gather"),
        ("ranks", "Ranks", "gather", "dist.all_gather_single"),
    ):
        lines = leaves_early(function_of(given[module], owner, name).body, collective)
        if lines is None:
            found.append(f"{module}: {owner}.{name} does not call {collective}")
        found += [f"{module}:{line} leaves before {collective}" for line in lines or ()]
    return found


# ---- the rules hold, and notice a break -------------------------------------------------------


def with_line(module: str, line: str) -> Callable[[dict[str, str]], None]:
    """A break: a line at a module's end."""

    def write(given: dict[str, str]) -> None:
        given[module] += f"\n{line}\n"

    return write


def with_line_before(module: str, statement: str, line: str) -> Callable[[dict[str, str]], None]:
    """A break: a line in front of a statement."""

    def write(given: dict[str, str]) -> None:
        lines = given[module].splitlines()
        (at,) = (i for i, text in enumerate(lines) if text.strip().startswith(statement))
        indent = " " * (len(lines[at]) - len(lines[at].lstrip()))
        given[module] = "\n".join([*lines[:at], indent + line, *lines[at:]])

    return write


AGREE = "verdict = ranks.agree("
GATHER = "rows = self.gather("

RULES: dict[Callable[[Sources], list[str]], list[Callable[[dict[str, str]], None]]] = {
    operations_import_nothing_of_the_package: [
        with_line("ops.plan", "from ..meter import angle_of"),
        with_line("ops.reference", "from autodrop_ext.checks import number"),
        with_line("ops.backends", "def f():\n    from .. import checks"),
        with_line("ops.triton", "importlib.import_module('autodrop_ext.meter')"),
        with_line("ops", "import autodrop_ext"),
    ],
    schedulers_never_import_operations: [
        with_line("schedulers.autodrop", "from ..ops.plan import Plan"),
        with_line("schedulers.base", "from .. import ops"),
        with_line("schedulers", "from autodrop_ext.ops import select"),
    ],
    checks_import_nothing: [with_line("checks", "from .saved import load")],
    files_of_the_meter_import_what_the_house_says: [
        with_line("sketch", "from .meter import angle_of"),
        with_line("sketch", "from .ranks import Ranks"),
        with_line("parameters", "from .sketch import Sketch"),
        with_line("ranks", "def f():\n    from .sketch import Sketch"),
        with_line("windows", "import autodrop_ext.checks"),
        with_line("velocity_model", "from .schedulers.base import Outcome"),
        with_line("average", "from .schedulers.base import as_floats"),
        lambda given: given.update(parts="from .sketch import Sketch"),
        lambda given: given.pop("windows"),
    ],
    nothing_is_imported_in_a_circle: [
        with_line("parameters", "from .meter import AngularVelocity"),
        with_line("reading", "def f():\n    from .log import JsonLinesLog"),
        with_line("ops.backends", "from . import select"),
        with_line("ops.plan", "from .backends import Backend"),
        with_line("checks", "from . import AngularVelocity"),
    ],
    nobody_reads_anothers_underscore_names: [
        with_line("schedulers.metered", "def f(scheduler): return scheduler.meter._sketch"),
        with_line("faults", "def f(other): other._names = []"),
        with_line("average", "from .messages import _warn"),
        with_line("cli.plot", "def f(meter): return getattr(meter, '_sketch')"),
    ],
    every_allowed_underscore_is_used: [
        lambda given: given.update({k: v.replace("_numels", "numels") for k, v in given.items()})
    ],
    nothing_leaves_before_the_collective: [
        with_line_before("meter", AGREE, "return None"),
        with_line_before("meter", AGREE, "if changed: raise RuntimeError"),
        with_line_before("meter", AGREE, "assert table"),
        with_line_before("ranks", GATHER, "return Agreement()"),
        with_line_before("ranks", GATHER, "if not facts: raise RuntimeError"),
        lambda given: given.update(meter=given["meter"].replace("ranks.agree", "ranks.decide")),
    ],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule: Callable[[Sources], list[str]]) -> None:
    assert rule(sources()) == []


@pytest.mark.parametrize(
    ("rule", "write"),
    [(rule, write) for rule, breaks in RULES.items() for write in breaks],
    ids=[f"{rule.__name__}-{i}" for rule, breaks in RULES.items() for i in range(len(breaks))],
)
def test_a_break_is_noticed(
    rule: Callable[[Sources], list[str]], write: Callable[[dict[str, str]], None]
) -> None:
    given = sources()
    write(given)
    assert given != sources()
    assert rule(given) != []


def test_relative_imports_are_read_as_python_reads_them() -> None:
    given = {"": "from . import a", "a": "", "room": "from .inner import x", "room.inner": ""}
    given["room.other"] = "from . import inner\nfrom .. import a\nfrom ..room.inner import y"
    assert [name for _, name in imports("", given)] == ["a"]
    assert [name for _, name in imports("room", given)] == ["room.inner"]
    assert [name for _, name in imports("room.other", given)] == ["room.inner", "a", "room.inner"]
