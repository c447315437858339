"""Imports run one way, down the floors of the design; and the networks need no more than jax and flax."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up, as in docs/architecture.md. A file imports from floors below its own, and from its own part.
PACKAGE = (
    ("dalle2_jax.errors",),
    ("dalle2_jax.files", "dalle2_jax.captions", "dalle2_jax.arguments"),
    (
        "dalle2_jax.images",
        "dalle2_jax.layers",
        "dalle2_jax.diffusion",
        "dalle2_jax.tokenizer",
        "dalle2_jax.sharding",
    ),
    (
        "dalle2_jax.clip",
        "dalle2_jax.prior",
        "dalle2_jax.decoder",
        "dalle2_jax.lineage",
        "dalle2_jax.data",
        "dalle2_jax.checkpoint",
    ),
    ("dalle2_jax.unclip", "dalle2_jax.weights"),
    ("dalle2_jax.manipulate", "dalle2_jax.systems"),
    ("dalle2_jax.evaluation",),
    ("dalle2_jax.playground",),
    ("dalle2_jax.cli",),
)
TRAIN = (
    ("train.config", "train.machine"),
    ("train.recipes", "train.step"),
    ("train.loop",),
    ("train.run",),
    ("train.describe", "train.interactive", "train.__main__"),
)
FLOOR = {part: number for floors in (PACKAGE, TRAIN) for number, floor in enumerate(floors) for part in floor}
# Of the package, what training may import: its lower floors.
FOR_TRAINING = {part for floor in PACKAGE[:4] for part in floor}
NETWORKS_AT = ("dalle2_jax.clip", "dalle2_jax.prior", "dalle2_jax.decoder", "dalle2_jax.lineage")
NO_JAX = ("dalle2_jax.data", "dalle2_jax.tokenizer", "dalle2_jax.images")
# What may be imported while a network is imported, beside dalle2_jax itself.
NETWORK_LIBRARIES = {"jax", "jaxlib", "flax", "numpy", "optax", *sys.stdlib_module_names}
# A TFDS builder is a class, so its file imports TFDS; nothing imports that file before it is needed.
BUILDERS = ("dalle2_jax.data.sources.captioned_shapes", "dalle2_jax.data.sources.emoji")
OUTSIDE = {"train", "configs", "tests", "benchmarks"}  # of the library: only the checkout has them
HEAVY = ("tensorflow_datasets", "grain", "orbax", "PIL", "tokenizers", "tensorboardX", "tensorflow", "torch")
NETWORKS = "dalle2_jax, dalle2_jax.clip, dalle2_jax.prior, dalle2_jax.decoder, dalle2_jax.diffusion, dalle2_jax.lineage"


def sources() -> dict[str, Path]:
    """{module name: file} of everything in dalle2_jax, train and configs."""
    found = {}
    for top in ("dalle2_jax", "train", "configs"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imports(path: Path, module: str, at_import: bool = False) -> set[str]:
    """The modules that a file imports, anywhere in it or only where importing the file runs it."""
    names = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import):
                names.update(alias.name for alias in child.names)
            if isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module} imports relatively"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    names.add(whole if whole in SOURCES else child.module)
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def part(module: str) -> str | None:
    """The part of the design that a module belongs to; None for the package itself and for other people's code."""
    return next((name for name in FLOOR if module == name or module.startswith(name + ".")), None)


def house(name: str) -> str:
    return name.split(".")[0]


def crossings() -> list[tuple[str, str, str]]:
    """(module, its part, the other part of the same house that it imports)."""
    found = []
    for module, path in SOURCES.items():
        for name in imports(path, module):
            of, to = part(module), part(name)
            if of and to and to != of and house(of) == house(to):
                found.append((module, of, to))
    return found


def test_every_module_has_its_floor():
    homeless = {name for name in SOURCES if part(name) is None and house(name) != "configs"}
    assert homeless <= {"dalle2_jax", "dalle2_jax._version", "train"}
    assert len(crossings()) > 100


def test_imports_run_downward():
    wrong = [(module, to) for module, of, to in crossings() if FLOOR[to] >= FLOOR[of]]
    # `describe` is a command of its own, which the command line calls.
    assert wrong == [("train.__main__", "train.describe")]


def test_training_needs_the_lower_floors_alone():
    for module, path in SOURCES.items():
        if module.startswith("train"):
            used = {part(name) for name in imports(path, module) if name.startswith("dalle2_jax.")}
            assert used - {None} <= FOR_TRAINING, module


def test_no_file_and_no_class_is_too_long():
    for module, path in SOURCES.items():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, module
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < 250, f"{module}.{node.name}"


def test_the_library_knows_neither_training_nor_configs():
    for module, path in SOURCES.items():
        if module.startswith("dalle2_jax"):
            assert not {name.split(".")[0] for name in imports(path, module)} & OUTSIDE, module


def test_diffusion_sees_no_network():
    for module, path in SOURCES.items():
        if part(module) == "dalle2_jax.diffusion":
            assert not any(name.split(".")[0] == "flax" for name in imports(path, module)), module


def test_data_images_and_tokenizer_have_no_jax():
    for module, path in SOURCES.items():
        if part(module) in NO_JAX:
            found = {name.split(".")[0] for name in imports(path, module)}
            assert not found & {"jax", "jaxlib", "flax", "optax"}, module


def test_what_networks_import():
    for module, path in SOURCES.items():
        if part(module) in ("dalle2_jax.layers", "dalle2_jax.diffusion", *NETWORKS_AT):
            found = {name.split(".")[0] for name in imports(path, module)}
            assert found <= NETWORK_LIBRARIES | {"dalle2_jax"}, module


def test_heavy_libraries_wait_until_they_are_used():
    """Only the TFDS builder, which is imported to be prepared, imports one of them at once."""
    for module, path in SOURCES.items():
        if module.startswith("dalle2_jax") and module not in BUILDERS:
            found = {name.split(".")[0] for name in imports(path, module, at_import=True)}
            assert not found & set(HEAVY), module


PROGRAM = f"""
    import sys, time
    import jax, flax.linen, optax, numpy
    before, start = set(sys.modules), time.perf_counter()
    import {NETWORKS}
    seconds = time.perf_counter() - start
    loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, heavy
    from jax._src import xla_bridge
    assert not xla_bridge._backends, "importing started a backend"
    assert loaded <= {{"dalle2_jax"}} | set(sys.stdlib_module_names), loaded
    assert seconds < 2, seconds
    print("imported in", round(seconds, 2))
"""


def run_program(python: str | Path, folder: Path) -> str:
    program = folder / "program.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(PROGRAM))
    done = subprocess.run([python, "-I", program], capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_networks_is_quick_and_loads_nothing_heavy(tmp_path):
    assert "imported in" in run_program(sys.executable, tmp_path)


@pytest.mark.slow
def test_importing_the_networks_with_jax_and_flax_alone(tmp_path):
    """In a virtual environment with jax, flax, optax and numpy, as people have who lift a module out."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "jax", "flax", "optax", "numpy"], check=True, timeout=1200)
    # flax asks for orbax and more, which nothing of ours may need: without them it has to work as well.
    extras = ["orbax-checkpoint", "orbax-export", "tensorstore"]
    subprocess.run([*pip, "uninstall", "--yes", *extras], check=True, timeout=300)
    run_program(python, tmp_path)
