"""The house rules of `genesplice_hf` as functions over parsed files; `test_layering.py` runs them.

A rule is `check(source) -> complaints` plus examples: every bad one must raise a complaint, every good one
none, and both stand in the message of a failing test.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

PACKAGE = "genesplice_hf"

# Room -> the rooms and files it may import from. Its own files and `version` are always allowed.
MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "genome": {"errors"},
    "layers": {"errors"},
    "tokenization": {"errors", "genome"},
    "heads": {"errors", "layers"},
    "models": {"errors", "layers", "heads"},
    "data": {"errors", "genome", "tokenization"},
    "objectives": {"errors", "genome", "tokenization"},
    "adaptation": {"errors", "layers"},
    "scoring": {"errors", "genome", "tokenization", "data"},
    "interpretation": {"errors", "genome", "tokenization", "data", "scoring"},
    "hub": {"errors", "models", "tokenization"},
}
# These see every room and nobody imports them: the package root (`__init__.py`) and the command line.
TOP = ("__init__", "cli")
# The files of `models` that may import every model.
COLLECTORS = ("models/registry.py", "models/tiny_configs.py", "models/original.py")
SHARED_BY_MODELS = "models.auto"
# Rooms whose files are copied flat into published repositories.
BUNDLED = ("genome", "layers", "tokenization", "heads", "models")
# The repository's own folders outside the package.
OUTSIDE = {"training", "benchmarks", "tests"}
# Third parties that a room must never import, wherever the import stands.
NEVER = {
    "genome": {"torch", "transformers", "pysam", "pathlib", "io", "os", "gzip"},
    "models": {"peft"},
    "layers": {"peft"},
    "heads": {"peft"},
}
# Too heavy, or not installed everywhere: never at the top of a file that `import genesplice_hf` reaches.
HEAVY = {
    "anndata", "datasets", "flash_attn", "h5py", "kernels", "logomaker", "mamba_ssm", "matplotlib",
    "networkx", "pandas", "peft", "pyfaidx", "pysam", "scanpy", "scipy", "sklearn", "triton",
}  # fmt: skip
PLOTTING = {"matplotlib", "logomaker"}
PLOTTING_FILE = "interpretation/plots.py"
JUNK_DRAWERS = {"utils", "util", "helpers", "common", "misc"}
MAX_LINES = 400


@dataclass(frozen=True)
class Import:
    """One imported module: dotted name, line, where it stands (in a function, class or branch; for types alone)."""

    module: str
    line: int
    nested: bool
    in_function: bool
    for_types: bool = False


@dataclass(frozen=True)
class Source:
    """One file of the package: its path below `genesplice_hf/` and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        """Dotted name inside the package: `layers.attention`; `__init__` for the package root."""
        parts = self.path.removesuffix(".py").split("/")
        return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        return self.module.split(".")[0]

    @cached_property
    def imports(self) -> list[Import]:
        return list(_imports(self.tree, Import("", 0, nested=False, in_function=False)))

    def own_imports(self) -> Iterator[tuple[str, Import]]:
        """First-party imports, each with its dotted name below the package (`__init__` for the root)."""
        for found in self.imports:
            if found.module.split(".")[0] == PACKAGE:
                yield found.module.removeprefix(PACKAGE).lstrip(".") or "__init__", found


def _imports(node: ast.AST, place: Import) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (replace(place, module=alias.name, line=child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.level == 0:
            yield replace(place, module=child.module or "", line=child.lineno)
        else:
            yield from _imports(child, _inside(child, place))


def _inside(node: ast.AST, place: Import) -> Import:
    """Where an import stands that stands in `node`."""
    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return replace(
        place,
        nested=True,
        in_function=place.in_function or function,
        for_types=place.for_types or for_types,
    )


def room_of(module: str) -> str:
    return module.split(".")[0]


def top_name(module: str) -> str:
    return module.split(".")[0]


def _calls(source: Source) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the dotted name it is written with (`print`, `torch.load`)."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def downward(source: Source) -> list[str]:
    """A room imports only the rooms that the table allows."""
    if source.module in TOP:
        return []
    if source.room not in MAY_IMPORT:
        return [f"room `{source.room}` is not in the table of house_rules.py: add it with what it may import"]
    allowed = MAY_IMPORT[source.room] | {source.room, "version", *TOP}
    return [
        f"line {found.line}: `{source.room}` may not import `{module}`"
        for module, found in source.own_imports()
        if room_of(module) not in allowed
    ]


def models_apart(source: Source) -> list[str]:
    """A model imports its own folder and `models/auto.py`, never another model, the registry or the door."""
    if source.room != "models" or source.path in (*COLLECTORS, "models/__init__.py"):
        return []
    folder = source.module.split(".")[1] if source.path.count("/") > 1 else None
    return [
        f"line {found.line}: `{source.path}` may not import `{module}`"
        for module, found in source.own_imports()
        if room_of(module) == "models"
        and not (folder and (module == SHARED_BY_MODELS or module.split(".")[1:2] == [folder]))
    ]


def nothing_above(source: Source) -> list[str]:
    """Nothing imports the package root, the command line or the folders around the package."""
    own = [
        f"line {found.line}: `{module}` is above every room"
        for module, found in source.own_imports()
        if room_of(module) in TOP
    ]
    around = [
        f"line {found.line}: `{found.module}` lies outside the package"
        for found in source.imports
        if top_name(found.module) in OUTSIDE
    ]
    return own + around


def absolute(source: Source) -> list[str]:
    """Imports are absolute and name what they import."""
    complaints = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            complaints.append(f"line {node.lineno}: relative import")
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            complaints.append(f"line {node.lineno}: wildcard import")
    return complaints


def at_the_top(source: Source) -> list[str]:
    """First-party imports stand at the top of the file, in the open."""
    hidden = [f"line {found.line}: `{module}` hides" for module, found in source.own_imports() if found.nested]
    dynamic = [
        f"line {call.lineno}: `{name}` imports `{call.args[0].value}` behind the reader's back"
        for name, call in _calls(source)
        if name.split(".")[-1] in ("import_module", "__import__")
        and call.args
        and isinstance(call.args[0], ast.Constant)
        and top_name(str(call.args[0].value)) == PACKAGE
    ]
    return hidden + dynamic


def forbidden_third_parties(source: Source) -> list[str]:
    """Some rooms stay free of some libraries; plotting lives in one file."""
    never = NEVER.get(source.room, set()) | (PLOTTING if source.path != PLOTTING_FILE else set())
    complaints = [
        f"line {found.line}: `{source.room}` may not import `{found.module}`"
        for found in source.imports
        if top_name(found.module) in never
    ]
    if source.room == "genome":
        complaints += [
            f"line {call.lineno}: `genome` reads no files" for name, call in _calls(source) if name == "open"
        ]
    return complaints


def tokenizers_without_torch(source: Source) -> list[str]:
    """Tokenizers import without torch: it may only be imported in the function that makes tensors."""
    return [
        f"line {found.line}: `{found.module}` at module level"
        for found in source.imports
        if source.room == "tokenization" and top_name(found.module) == "torch" and not found.in_function
    ]


def light(source: Source) -> list[str]:
    """A file that `import genesplice_hf` reaches imports heavy or optional packages in functions only."""
    return [
        f"line {found.line}: `{found.module}` is imported by `import {PACKAGE}`"
        for found in source.imports
        if top_name(found.module) in HEAVY and not found.in_function
    ]


def bundle_ready(source: Source) -> list[str]:
    """Files that are published flat find themselves neither by import machinery nor by their own path."""
    if source.room not in BUNDLED or source.path in COLLECTORS:
        return []
    machinery = [
        f"line {found.line}: `{found.module}`"
        for found in source.imports
        if top_name(found.module) in ("importlib", "pkgutil")
    ]
    own_path = [
        f"line {node.lineno}: `__file__`"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Name) and node.id == "__file__"
    ]
    return machinery + own_path


def no_forbidden_calls(source: Source) -> list[str]:
    """No `print` outside the command line, no copier of transformers, no unpickling outside converters."""
    complaints = []
    for name, call in _calls(source):
        if name == "print" and source.module != "cli":
            complaints.append(f"line {call.lineno}: print")
        if name.split(".")[-1] == "register_for_auto_class":
            complaints.append(f"line {call.lineno}: register_for_auto_class (use hub/bundle.py)")
        if name == "torch.load" and not (source.room == "models" and _is_weights_only(call)):
            complaints.append(f"line {call.lineno}: torch.load")
    return complaints


def _is_weights_only(call: ast.Call) -> bool:
    return any(key.arg == "weights_only" and ast.unparse(key.value) == "True" for key in call.keywords)


def no_blind_except(source: Source) -> list[str]:
    """An except names what it expects; catching everything is for clean-up that raises again."""
    blind = {"Exception", "BaseException"}
    complaints = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = {part.strip("() ") for part in ast.unparse(node.type).split(",")} if node.type else blind
            if caught & blind and not (isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None):
                complaints.append(f"line {node.lineno}: blind except")
    suppressed = [
        f"line {call.lineno}: {ast.unparse(call)}"
        for name, call in _calls(source)
        if name.split(".")[-1] == "suppress" and blind & {ast.unparse(arg) for arg in call.args}
    ]
    return complaints + suppressed


def no_export_lists(source: Source) -> list[str]:
    """What a file offers is what it defines: no `__all__`; a name passed on says so (`import x as x`)."""
    return [
        f"line {node.lineno}: __all__"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Name) and node.id == "__all__"
    ]


def empty_doors(source: Source) -> list[str]:
    """The `__init__.py` of a room is empty, so that importing one file never drags in its neighbours."""
    statements = [node for node in source.tree.body if not _is_docstring(node)]
    is_room_door = source.path.endswith("/__init__.py") and source.path.count("/") == 1
    return [f"line {statements[0].lineno}: code in {source.path}"] if is_room_door and statements else []


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def shape_of_files(source: Source) -> list[str]:
    """A file opens with its job, stays short, is no junk drawer, and only `models/` holds sub-packages."""
    complaints = []
    lines = source.text.count("\n") + 1
    if lines > MAX_LINES:
        complaints.append(f"{lines} lines; at most {MAX_LINES}: give a part of it a file and a name")
    if source.text.strip() and ast.get_docstring(source.tree) is None:
        complaints.append("no docstring at the head of the file: say its job in one line")
    if JUNK_DRAWERS & set(source.module.split(".")):
        complaints.append("a file is named after its subject, never `utils`")
    if source.path.count("/") > (2 if source.room == "models" else 1):
        complaints.append("rooms hold files, not sub-packages; only `models/<name>/` nests")
    return complaints


def body_lines(source: Source) -> list[int]:
    """The length of every function body in lines, docstrings not counted."""
    lengths = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if _is_docstring(node.body[0]) else node.body
            lengths.append((body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0)
    return lengths


def edges(sources: list[Source]) -> dict[str, set[str]]:
    """Which file imports which, by module; `from package.room import file` counts as importing the file."""
    known = {source.module for source in sources}
    return {
        source.module: {
            target
            for module, _ in source.own_imports()
            for target in (module, *_submodules(source, module))
            if target in known and target != source.module
        }
        for source in sources
    }


def _submodules(source: Source, module: str) -> Iterator[str]:
    full = PACKAGE if module == "__init__" else f"{PACKAGE}.{module}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.module == full:
            yield from (f"{module}.{alias.name}".removeprefix("__init__.") for alias in node.names)


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """One import cycle as a closed path of modules, or an empty list."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if cycle := visit(target, [*path, module]):
                return cycle
        done.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := visit(module, []))), [])


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Every module that importing `start` imports too, itself included."""
    seen, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting.extend(graph.get(module, ()))
    return seen


@dataclass(frozen=True)
class Rule:
    """A check with examples, each a (path, code) pair; `reached_only` limits it to what the root imports."""

    check: Callable[[Source], list[str]]
    bad: tuple[tuple[str, str], ...]
    good: tuple[tuple[str, str], ...]
    reached_only: bool = False
