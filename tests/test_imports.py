"""The rooms of the package: who may import whom, and what `import tritonnorm` loads."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("tritonnorm", "bench")
LEAVES = (
    *("activated", "activation", "conditions", "device", "folding", "norms.problem"),
    *("norms.reference", "problem", "reference", "report", "settings"),
)


@dataclass(frozen=True)
class Room:
    """What the modules that match `pattern` may import: ours (patterns), and from elsewhere."""

    pattern: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...] = ("torch",)
    without: tuple[str, ...] = ()  # of the standard library


# The first row whose pattern matches decides. Names are relative to tritonnorm, "" is the package
# itself. A module without a row fails: give it a place in docs/architecture.md and a row here.
KERNELS = ("kernels", "kernels.base")
IMPURE = ("activated", "conditions", "report", "settings")
PURE_LEAVES = tuple(leaf for leaf in LEAVES if leaf not in IMPURE)
FOR_TRIALS = tuple(f"kernels.{n}" for n in ("folding", "group_base", "masked_launches", "planes"))
LOOKUP = ("tune.key", "tune.revisions", "tune.agree", "tune.store", "tune.lookup")
BELOW_OPS = (*LEAVES, *KERNELS, "plan", "recipe", "operators")
BELOW_NN = (*BELOW_OPS, "ops", "autograd", "functional")
SYNC = ("sync.functional", "sync.nn")
ABOVE = (*BELOW_NN, "nn", "joined", "conv_nn", *SYNC)
ROOMS = (
    Room("report", ours=(), theirs=("pandas",)),
    Room("activated", ours=("activation",)),
    Room("reference", ours=("activation",)),
    Room("norms.reference", ours=("activation", "reference")),
    Room("norms.problem", ours=("problem",)),
    Room("conditions", ours=("device", "settings")),
    *(Room(leaf, ours=()) for leaf in LEAVES),
    Room("kernels._body", ours=("kernels._tile", "kernels._epilogue"), theirs=("triton",)),
    Room("kernels._persistent*", ours=("kernels._*",), theirs=("triton",), without=("os",)),
    Room("kernels._resident", ours=("kernels._*",), theirs=("triton",), without=("os",)),
    Room(
        "kernels._groups",
        ours=("kernels._tile", "kernels._epilogue", "kernels._moments"),
        theirs=("triton",),
    ),
    Room("kernels._group_*", ours=("kernels._groups", "kernels._moments"), theirs=("triton",)),
    Room("kernels._*", ours=(), theirs=("triton",), without=("os",)),
    Room("kernels", ours=(*PURE_LEAVES, "kernels.*"), without=("os",)),
    Room(
        "kernels.synced",
        ours=("problem", *(f"kernels.{n}" for n in ("base", "split", "streaming", "tiling"))),
        without=("os",),
    ),
    Room(
        "kernels.masked_launches",
        ours=(
            *(*PURE_LEAVES, "kernels.masked"),
            *("kernels.base", "kernels.split", "kernels.streaming", "kernels.tiling"),
        ),
        theirs=("torch", "triton"),
        without=("os",),
    ),
    Room(
        "kernels.fold_configs",
        ours=(*PURE_LEAVES, "kernels.base", "kernels.folding"),
        without=("os",),
    ),
    Room(
        "kernels.*",
        ours=(
            *(*PURE_LEAVES, "kernels._*", "kernels.base", "kernels.*_base", "kernels.launch"),
            *("kernels.lasting", "kernels.tiling", "kernels.planes", "kernels.streaming"),
        ),
        theirs=("torch", "triton"),
        without=("os",),
    ),
    Room("timing", ours=LEAVES),
    Room("tune", ours=()),
    Room("tune.key", ours=LEAVES),
    Room("tune.revisions", ours=()),
    Room("tune.networks", ours=()),
    Room("tune.agree", ours=LEAVES),
    Room("tune.store", ours=(*LEAVES, "tune.key"), theirs=("torch", "platformdirs")),
    Room("tune.lookup", ours=(*LEAVES, *KERNELS, "tune.key", "tune.revisions", "tune.store")),
    Room("tune.standing", ours=(*LEAVES, *LOOKUP)),
    Room("tune.loops", ours=(), theirs=()),
    Room("tune.machine_code", ours=("tune.loops",), theirs=("triton",)),
    Room(
        "tune.*",
        ours=(*BELOW_OPS, "observe", "timing", *FOR_TRIALS, "tune.*"),
        theirs=("torch", "triton"),
    ),
    Room(
        "plan",
        ours=(*LEAVES, *KERNELS, *(f"tune.{n}" for n in ("agree", "key", "store", "standing"))),
    ),
    Room(
        "recipe",
        ours=(*LEAVES, *KERNELS, "plan", "tune.key", "tune.standing", "tune.online"),
    ),
    Room("operators", ours=()),
    Room("observe", ours=(*LEAVES, *KERNELS, "operators", "plan", "tune.key")),
    Room("explanation", ours=(*LEAVES, *KERNELS, "observe", "plan")),
    Room(
        "warming",
        ours=(*LEAVES, *KERNELS, "observe", "frozen", "fold_ops"),
        theirs=("torch", "triton"),
    ),
    Room("ops", ours=BELOW_OPS),
    Room("autograd", ours=(*LEAVES, "ops", "recipe")),
    *(Room(room, ours=()) for room in ("norms", "sequences", "sync")),
    Room("norms.ops", ours=(*BELOW_OPS, "kernels.group_base", "ops")),
    Room("norms.autograd", ours=(*LEAVES, "norms.ops")),
    Room("norms.functional", ours=(*LEAVES, "norms.autograd", "functional")),
    Room("functional", ours=(*LEAVES, "autograd", "norms.functional")),
    Room("nn", ours=(*LEAVES, "functional")),
    Room("sync.ops", ours=(*BELOW_OPS, "ops", "kernels.synced")),
    Room("sync.functional", ours=(*LEAVES, "ops", "sync.ops")),
    Room("sync.nn", ours=(*LEAVES, "nn", "sync.functional")),
    Room("sequences.ops", ours=(*BELOW_OPS, "ops", "kernels.masked_launches")),
    Room("sequences.masked", ours=(*LEAVES, "functional", "sequences.ops")),
    Room("sequences.recurrent", ours=("sequences.masked",)),
    Room("norms.nn", ours=(*LEAVES, "functional")),
    Room("joined", ours=(*LEAVES, "nn")),
    Room("conv_nn", ours=("joined", "nn")),
    Room(
        "fold_ops",
        ours=(
            *LEAVES,
            *(f"kernels.{n}" for n in ("folding", "fold_configs", "lasting")),
            "plan",
            "recipe",
        ),
    ),
    Room("frozen", ours=(*LEAVES, "nn", "fold_ops", "kernels.folding")),
    Room("freeze", ours=(*LEAVES, "frozen", "joined", "fold.pairing")),
    Room("flow*", ours=("flow.guard",)),
    Room("fusing", ours=()),
    Room("fusing.*", ours=(*ABOVE, "flow.*", "fusing.*", "norms.nn")),
    Room("norms.swap", ours=("norms.nn",)),
    Room("replace", ours=(*ABOVE, "flow.*", "fusing.*", "norms.swap")),
    Room("fold", ours=(*ABOVE, "flow.*", "fold.*")),
    Room("fold.*", ours=(*ABOVE, "flow.*", "fold", "fold.*")),
    Room("cli*", ours=("*", ""), theirs=("torch", "triton", "safetensors", "rich")),
    Room("__main__", ours=("cli.*",)),
    Room(
        "",
        ours=(
            *(
                *ABOVE,
                "sequences.masked",
                "sequences.recurrent",
                "norms.nn",
                "replace",
                "freeze",
                "fold",
                "fold.*",
            ),
            *("explanation", "warming"),
        ),
    ),
)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imports_of(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Full names of the modules imported anywhere; `from a import b` gives a.b if that is one."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*up, base] if base else up)
            names = {f"{base}.{alias.name}" for alias in node.names}
            inside = {name for name in names if name in MODULES}
            found |= inside if len(inside) == len(names) else inside | {base}
    return found


def top(name: str) -> str:
    return name.partition(".")[0]


def inside(name: str) -> str:
    """The name relative to tritonnorm."""
    return name.removeprefix("tritonnorm").removeprefix(".")


def room_of(module: str) -> Room | None:
    return next((room for room in ROOMS if fnmatchcase(inside(module), room.pattern)), None)


def faults(module: str, imported: set[str]) -> list[str]:
    """What in `imported` the table forbids to `module`."""
    room = room_of(module)
    if room is None:
        return [f"{module}: has no row in the table of rooms"]
    found = []
    for name in sorted(imported):
        if top(name) == "tritonnorm":
            ours = room.ours if inside(name) else [p for p in room.ours if not p]
            fine = any(fnmatchcase(inside(name), p) for p in ours)
        elif top(name) in sys.stdlib_module_names:
            fine = top(name) not in room.without
        else:
            fine = top(name) in room.theirs
        if not fine:
            found.append(f"{module}: may not import {name}")
    return found


def imported_by(module: str) -> set[str]:
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return imports_of(tree, module, is_package=path.name == "__init__.py")


@pytest.mark.parametrize("module", sorted(m for m in MODULES if top(m) == "tritonnorm"))
def test_the_package_keeps_to_the_table(module: str) -> None:
    assert faults(module, imported_by(module)) == []


BENCH_MAY = {
    *("", "nn", "norms.nn", "functional", "replace", "fold"),  # the public API
    *("timing", "problem", "plan", "reference", "tune.static", "tune.prune", "activation"),
    *("norms.problem", "norms.reference"),
    *("tune.networks", "folding", "fold_ops"),  # bench.folds measures the last two
    *(
        "device",
        "kernels",
        "kernels.base",
    ),  # the audits: ALGORITHMS on Devices made by hand
}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if top(m) == "bench"))
def test_bench_imports_no_private_kernel(module: str) -> None:
    imported = imported_by(module)
    ours = {inside(name) for name in imported if top(name) == "tritonnorm"}
    assert ours <= BENCH_MAY
    assert "tests" not in {top(name) for name in imported}


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("tritonnorm.problem", "import triton", "triton"),
        ("tritonnorm.device", "from .problem import View", "tritonnorm.problem"),
        ("tritonnorm.kernels._tile", "import torch", "torch"),
        ("tritonnorm.kernels._tile", "from . import _moments", "tritonnorm.kernels._moments"),
        ("tritonnorm.kernels.split", "from ..plan import plan", "tritonnorm.plan"),
        ("tritonnorm.kernels.split", "from . import resident", "tritonnorm.kernels.resident"),
        ("tritonnorm.kernels.split", "import os", "os"),
        ("tritonnorm.plan", "def f():\n    from tritonnorm import ops", "tritonnorm.ops"),
        ("tritonnorm.ops", "from .functional import batch_norm", "tritonnorm.functional"),
        ("tritonnorm.functional", "import tritonnorm", "tritonnorm"),
        ("tritonnorm.nn", "from bench.lab import interpreter", "bench.lab.interpreter"),
        ("tritonnorm.replace", "from .cli.main import main", "tritonnorm.cli.main"),
    ],
)
def test_the_table_forbids(
    module: str, line: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (module, expected):  # the names stand for modules whether or not they exist yet
        monkeypatch.setitem(MODULES, name, ROOT)
    found = faults(module, imports_of(ast.parse(line), module, is_package=False))
    assert found == [f"{module}: may not import {expected}"]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process, from the root of the checkout, without Triton's interpreter."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTEST"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_importing_loads_neither_triton_nor_cuda() -> None:
    done = python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import tritonnorm\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'triton', 'pandas', 'rich', 'bench', 'transformers', 'sklearn'}))\n"
        "print('triton' in sys.modules, torch.cuda.is_initialized())\n"
        "print('tritonnorm.fusing.search' in sys.modules)\n"  # replace loads it when it is called
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "False False", "False"]


def test_works_where_triton_cannot_be_imported() -> None:
    done = python(
        "import sys\n"
        "sys.modules['triton'] = None\n"  # import triton -> ModuleNotFoundError
        "import torch, tritonnorm\n"
        "torch.manual_seed(0)\n"
        "x = torch.randn(4, 6, 5, 5, requires_grad=True)\n"
        "ours = tritonnorm.BatchNorm2d(6, activation='relu')\n"
        "theirs = torch.nn.BatchNorm2d(6)\n"
        "y = ours(x)\n"
        "y.sum().backward()\n"
        "print(torch.equal(y, torch.relu(theirs(x))), bool(x.grad.isfinite().all()))\n"
        "print(torch.equal(ours.running_var, theirs.running_var))\n"
        "net, report = tritonnorm.replace(torch.nn.Sequential(torch.nn.BatchNorm2d(6)))\n"
        "print(type(net[0]) is tritonnorm.BatchNorm2d, net(x).shape == x.shape)\n"
        "net, report = tritonnorm.fold(net.eval())\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 5
