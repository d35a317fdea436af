"""Follow first-party imports and lay the files out flat: the pure half of the bundler.

Module names go in, file texts come out; nothing here knows of models, registries or folders to write to.
"""

import ast
import re
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeGuard

from genesplice_hf.errors import PublishError

# What a machine with transformers and torch has anyway: transformers demands every import outside `try`.
ALLOWED_THIRD_PARTY = frozenset({"torch", "transformers", "tokenizers", "huggingface_hub", "numpy", "safetensors"})
KEPT_PREFIXES = ("configuration_", "modeling_", "processing_", "tokenization_")
FORBIDDEN_NAMES = frozenset({"__file__", "__import__", "__path__"})
READING_CALLS = frozenset({"open", "read_text", "read_bytes", "loadtxt", "fromfile", "genfromtxt"})
# The stock copier of transformers finds the files that travel along by this expression, not by parsing.
STOCK_COPIER_IMPORT = re.compile(r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE)
STOCK_COPIER_BARE_IMPORT = re.compile(r"^\s*import\s+\.(\S+)\s*$", re.MULTILINE)


def flatten_modules(starts: Sequence[str], *, package: str, root: str | Path) -> dict[str, str]:
    """Follow the absolute first-party imports from some modules; return every reached file, rewritten.

    Args:
        starts: full module names, such as `"genesplice_hf.models.genesplice.modeling_genesplice"`.
        package: the name of the first-party package.
        root: the folder of that package.

    Returns:
        File name -> source text. `<room>/<file>.py` becomes `<room>_<file>.py`; names that begin with
        `configuration_`, `modeling_`, `processing_` or `tokenization_` stay as they are.

    Raises:
        PublishError: a missing module, two modules with one flat name, or code that cannot travel.
    """
    owners: dict[str, str] = {}
    texts: dict[str, str] = {}
    queue = deque(dict.fromkeys(starts))
    while queue:
        module = queue.popleft()
        name = flat_name(module, package)
        if owners.setdefault(name, module) != module:
            raise PublishError(f"`{owners[name]}` and `{module}` would both become {name}; rename one of them.")
        if name not in texts:
            source = _read_module(module, package, Path(root))
            texts[name], imported = rewrite_module(source, module=module, package=package)
            queue.extend(imported)
    return texts


def flat_name(module: str, package: str) -> str:
    """The file name of a module inside a bundle (see `flatten_modules`)."""
    parts = module.removeprefix(package + ".").split(".")
    return (parts[-1] if parts[-1].startswith(KEPT_PREFIXES) else "_".join(parts)) + ".py"


def rewrite_module(source: str, *, module: str, package: str) -> tuple[str, list[str]]:
    """Turn the first-party imports of one file into one-dot imports.

    Args:
        source: the text of the file.
        module: its full name, for messages.
        package: the first-party package.

    Returns:
        The new text, and the first-party modules that it imports, in order.

    Raises:
        PublishError: the file holds something that cannot travel, with its line.
    """
    tree = ast.parse(source, filename=module)
    _refuse_what_cannot_travel(tree, module, package)
    imports = [(node, node.module or "") for node in ast.walk(tree) if _is_first_party(node, package)]
    text = _replace_imports(source, imports, package)
    _check_stock_copier(text, [flat_name(name, package) for _, name in imports], module)
    return text, [name for _, name in imports]


def _is_first_party(node: ast.AST, package: str) -> TypeGuard[ast.ImportFrom]:
    return isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith(package + ".")


def _replace_imports(source: str, imports: list[tuple[ast.ImportFrom, str]], package: str) -> str:
    """Rewrite the `from <module>` part of each statement; backwards, so that earlier positions stay true."""
    # Not `splitlines`: it also splits at form feeds and the like, which the parser does not count as lines.
    lines = source.split("\n")
    for node, name in sorted(imports, key=lambda item: (item[0].lineno, item[0].col_offset), reverse=True):
        row = node.lineno - 1
        # ast counts columns in UTF-8 bytes.
        line = lines[row].encode("utf-8")
        before, after = line[: node.col_offset].decode("utf-8"), line[node.col_offset :].decode("utf-8")
        target = flat_name(name, package).removesuffix(".py")
        pattern = rf"from\s+{re.escape(name)}(?=\s)"
        lines[row] = before + re.sub(pattern, f"from .{target}", after, count=1)
    return "\n".join(lines)


def _check_stock_copier(text: str, expected: list[str], module: str) -> None:
    """The files that transformers' expression sees must be exactly those that the parser sees."""
    seen = STOCK_COPIER_IMPORT.findall(text) + STOCK_COPIER_BARE_IMPORT.findall(text)
    wanted = {name.removesuffix(".py") for name in expected}
    for name in sorted(set(seen) - wanted):
        raise PublishError(
            f"{module}: a line of text begins like the import of `.{name}`, and transformers would look for "
            "such a file; reword that line."
        )
    for name in sorted(wanted - set(seen)):
        raise PublishError(
            f"{module}: transformers would not see the import that becomes `.{name}`; write it as one "
            "statement `from package.room.file import Name` at the start of its own line."
        )


def _refuse_what_cannot_travel(tree: ast.Module, module: str, package: str) -> None:
    for node, guarded in _walk_with_guard(tree):
        reason = _import_fault(node, package, guarded) or _name_fault(node)
        if reason:
            raise PublishError(f"{module}, line {getattr(node, 'lineno', '?')}: {reason}")
    for node in _walk_import_time(tree):
        if isinstance(node, ast.Call) and _called_name(node) in READING_CALLS:
            raise PublishError(
                f"{module}, line {node.lineno}: `{_called_name(node)}` reads a file when the module is "
                "imported; data files do not travel with a bundle, so put the data into the config or the "
                "tokenizer files."
            )


def _walk_with_guard(node: ast.AST, guarded: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node with the answer whether it stands inside a `try` statement."""
    yield node, guarded
    for child in ast.iter_child_nodes(node):
        yield from _walk_with_guard(child, guarded or isinstance(node, ast.Try))


def _walk_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs at import: function bodies are left out."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from _walk_import_time(child)


def _called_name(node: ast.Call) -> str:
    return str(getattr(node.func, "id", "") or getattr(node.func, "attr", ""))


def _name_fault(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
        return f"`{node.id}` means something else inside a bundle; do without it."
    return None


def _import_fault(node: ast.AST, package: str, guarded: bool) -> str | None:
    if isinstance(node, ast.Import):
        faults = (_module_fault(alias.name, guarded) for alias in node.names)
        plain = [alias.name for alias in node.names if alias.name.split(".")[0] == package]
        if plain:
            return f"`import {plain[0]}` cannot be rewritten; write `from {package}.room.file import Name`."
        return next((fault for fault in faults if fault), None)
    if isinstance(node, ast.ImportFrom):
        return _import_from_fault(node, package, guarded)
    return None


def _import_from_fault(node: ast.ImportFrom, package: str, guarded: bool) -> str | None:
    if node.level:
        return f"relative imports are not followed; write `from {package}.room.file import Name`."
    if any(alias.name == "*" for alias in node.names):
        return "a wildcard import hides what is used; name the imported objects."
    if node.module == package:
        return f"the root of {package} drags everything in; write `from {package}.room.file import Name`."
    if _is_first_party(node, package):
        return None
    return _module_fault(node.module or "", guarded)


def _module_fault(name: str, guarded: bool) -> str | None:
    top = name.split(".")[0]
    if top == "importlib":
        return "`importlib` hides what is imported; use a plain import statement."
    if guarded or top in ALLOWED_THIRD_PARTY or top in sys.stdlib_module_names:
        return None
    return (
        f"`{top}` would be demanded of everyone who loads the model; allowed are "
        f"{', '.join(sorted(ALLOWED_THIRD_PARTY))} and the standard library, anything else inside `try`."
    )


def _read_module(module: str, package: str, root: Path) -> str:
    path = root.joinpath(*module.removeprefix(package + ".").split("."))
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py").read_text(encoding="utf-8")
    if path.is_dir():
        raise PublishError(f"`{module}` is a room, not a file; import from the file that defines the name.")
    raise PublishError(f"`{module}` is imported but {path.with_suffix('.py')} does not exist.")
