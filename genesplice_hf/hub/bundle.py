"""Make a model folder self-contained: our source files, flat, with one-dot imports and a complete `auto_map`.

A repository with such a bundle loads with `trust_remote_code=True` where this package is not installed.
The walk over the imports is `flatten_modules` in `flatten.py`; `write_bundle` applies it to a model.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from genesplice_hf.errors import PublishError
from genesplice_hf.hub.flatten import flat_name, flatten_modules
from genesplice_hf.models.registry import REGISTRY, ModelEntry
from genesplice_hf.version import __version__

logger = logging.getLogger(__name__)

PACKAGE = "genesplice_hf"
PACKAGE_ROOT = Path(__file__).resolve().parents[1]
BUNDLE_FILE = "bundle.json"


_COMPANIONS = (
    "\n\n# Added by the bundler: never run, but whoever copies this file copies these too.\n"
    "from typing import TYPE_CHECKING  # noqa: E402\n\n"
    "if TYPE_CHECKING:\n"
)


@dataclass(frozen=True)
class BundleReport:
    """What a bundle holds.

    Attributes:
        package: the name of the package that the files come from.
        version: its version.
        model_type: `model_type` of the bundled model.
        auto_map: Auto class name -> reference, as written to the JSON files.
        files: file name -> sha256 of its text, hexadecimal.
    """

    package: str
    version: str
    model_type: str
    auto_map: dict[str, Any]
    files: dict[str, str]


def write_bundle(
    folder: str | Path,
    model: PreTrainedModel | PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> BundleReport:
    """Add the code of a model and its tokenizer to a folder that `save_pretrained` has already written.

    Args:
        folder: holds `config.json` (and `tokenizer_config.json` when `tokenizer` is given).
        model: a model of this package, or its config; its `model_type` names the row of the registry.
        tokenizer: the tokenizer saved in the same folder; one of transformers' own needs no code.

    Returns:
        The report that also stands in `bundle.json`.

    Raises:
        PublishError: the folder was not saved first, the model type is unknown, or a file cannot be bundled.
    """
    folder = Path(folder)
    config = model if isinstance(model, PreTrainedConfig) else model.config
    entries = _entries_of(config)
    texts = flatten_modules(_starting_modules(entries, tokenizer), package=PACKAGE, root=PACKAGE_ROOT)
    texts = _with_companions(_with_sub_config_registration(texts, entries), entries[0])
    auto_map = _auto_map(entries[0], tokenizer)
    _write_auto_map(folder / "config.json", auto_map)
    if "AutoTokenizer" in auto_map:
        _write_auto_map(folder / "tokenizer_config.json", {"AutoTokenizer": auto_map["AutoTokenizer"]})
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    hashes = {name: _sha256(text.encode("utf-8")) for name, text in sorted(texts.items())}
    report = BundleReport(PACKAGE, __version__, config.model_type, auto_map, hashes)
    (folder / BUNDLE_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    logger.info("bundled %d files of %s %s into %s", len(texts), PACKAGE, __version__, folder)
    return report


def check_bundle(folder: str | Path) -> BundleReport:
    """Compare the files of a bundle with the sha256 sums in its `bundle.json`.

    Raises:
        PublishError: there is no bundle, or a file is missing or was changed; all such files are named.
    """
    path = Path(folder) / BUNDLE_FILE
    if not path.is_file():
        raise PublishError(f"`folder` ({folder}) must hold a {BUNDLE_FILE}; call `write_bundle` first.")
    report = BundleReport(**json.loads(path.read_text(encoding="utf-8")))
    changed = [name for name, digest in report.files.items() if _file_sha256(path.parent / name) != digest]
    if changed:
        raise PublishError(f"These files of the bundle are missing or changed: {', '.join(changed)}; bundle again.")
    return report


def _entries_of(config: PreTrainedConfig) -> list[ModelEntry]:
    """The registry rows of a config and of the configs inside it, the outer one first."""
    rows = {entry.model_type: entry for entry in REGISTRY.values()}
    if config.model_type not in rows:
        raise PublishError(
            f"`model` must be of a registered model type ({', '.join(sorted(rows))}), was "
            f"`{config.model_type}`; a model of transformers itself needs no bundle."
        )
    inner = [getattr(config, name, None) for name in type(config).sub_configs]
    found = {config.model_type: rows[config.model_type]}
    for sub in inner:
        if isinstance(sub, PreTrainedConfig) and sub.model_type in rows:
            found.update((entry.model_type, entry) for entry in _entries_of(sub))
    return list(found.values())


def _starting_modules(entries: Sequence[ModelEntry], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    classes = [cls for entry in entries for cls in (entry.config_class, *entry.auto_classes.values())]
    if _is_ours(tokenizer):
        classes.append(type(tokenizer))
    return list(dict.fromkeys(cls.__module__ for cls in classes if cls.__module__.startswith(PACKAGE + ".")))


def _is_ours(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    return type(tokenizer).__module__.startswith(PACKAGE + ".")


def _reference(cls: type) -> str:
    return f"{flat_name(cls.__module__, PACKAGE).removesuffix('.py')}.{cls.__name__}"


def _auto_map(entry: ModelEntry, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    auto_map: dict[str, Any] = {"AutoConfig": _reference(entry.config_class)}
    auto_map |= {name: _reference(cls) for name, cls in entry.auto_classes.items()}
    if _is_ours(tokenizer):
        auto_map["AutoTokenizer"] = [_reference(type(tokenizer)), None]
    return auto_map


def _write_auto_map(path: Path, auto_map: dict[str, Any]) -> None:
    if not path.is_file():
        raise PublishError(f"`folder` must hold {path.name} already; call `save_pretrained({path.parent})` first.")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["auto_map"] = auto_map
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _with_sub_config_registration(texts: Mapping[str, str], entries: Sequence[ModelEntry]) -> dict[str, str]:
    """Append what `AutoModel.from_config(sub_config)` needs to find bundled classes of inner models."""
    texts = dict(texts)
    outer = entries[0]
    for inner in entries[1:]:
        name = flat_name(outer.config_class.__module__, PACKAGE)
        texts[name] += _config_registration(inner.model_type, _reference(inner.config_class))
        for auto_name, cls in inner.auto_classes.items():
            for modeling in {flat_name(head.__module__, PACKAGE) for head in outer.auto_classes.values()}:
                texts[modeling] += _model_registration(auto_name, cls, inner.config_class)
    return texts


def _with_companions(texts: Mapping[str, str], entry: ModelEntry) -> dict[str, str]:
    """Lets the files that hold the Auto classes name each other.

    Saving a model that was loaded from a bundle copies only the files that its own class reaches, and the `auto_map`
    of the copy must find every class.
    """
    references = {_reference(cls).split(".")[0]: cls.__name__ for cls in entry.auto_classes.values()}
    texts = dict(texts)
    for module in references:
        others = [f"    from .{other} import {name}" for other, name in references.items() if other != module]
        if others:
            texts[f"{module}.py"] += _COMPANIONS + "\n".join(f"{line}  # noqa: F401" for line in others) + "\n"
    return texts


def _config_registration(model_type: str, reference: str) -> str:
    module, name = reference.split(".")
    return (
        "\n\n# Added by the bundler: the inner model's config type must be known without the package.\n"
        "from transformers import AutoConfig as _AutoConfig  # noqa: E402\n"
        "from transformers import CONFIG_MAPPING as _CONFIG_MAPPING  # noqa: E402\n\n"
        f"from .{module} import {name} as _{name}  # noqa: E402\n\n"
        f'if "{model_type}" not in _CONFIG_MAPPING:\n'
        f'    _AutoConfig.register("{model_type}", _{name})\n'
    )


def _model_registration(auto_name: str, cls: type, config_class: type) -> str:
    """Code that registers an inner model for every loaded copy of its config class.

    From a local folder transformers imports the configuration and the modeling file into two modules named
    after their contents, so the config class exists twice; both copies are looked up in `sys.modules`.
    """
    module, name = _reference(cls).split(".")
    config_module, config_name = _reference(config_class).split(".")
    register = f"_register_{auto_name}_{name}"
    return (
        "\n\n# Added by the bundler: the inner model must be found by its config without the package.\n"
        f"from .{module} import {name} as _{auto_name}_{name}  # noqa: E402\n\n\n"
        f"def {register}():\n"
        "    import sys\n\n"
        "    import transformers\n\n"
        f'    auto_class = getattr(transformers, "{auto_name}", None)\n'
        "    for module_name, module in list(sys.modules.items()):\n"
        f'        is_copy = module_name.split(".")[-1] == "{config_module}"\n'
        f'        config_class = getattr(module, "{config_name}", None) if is_copy else None\n'
        "        if auto_class and config_class and config_class not in auto_class._model_mapping:\n"
        f"            auto_class.register(config_class, _{auto_name}_{name})\n\n\n"
        f"{register}()\n"
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_sha256(path: Path) -> str | None:
    return _sha256(path.read_bytes()) if path.is_file() else None
