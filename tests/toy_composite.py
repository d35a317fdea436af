"""A package on disk whose outer model holds an inner one by a sub-config: what the bundler must carry along."""

import importlib
import textwrap

FILES = {
    "errors.py": "class ToyError(ValueError):\n    pass\n",
    "layers/__init__.py": "",
    "layers/scale.py": """
        from typing import TYPE_CHECKING

        if TYPE_CHECKING:
            from toygenes.errors import ToyError


        def scale(x):
            from toygenes.layers.factor import (
                FACTOR as UMLAUT_ÄÖ,  # a comment
            )

            return x * UMLAUT_ÄÖ
        """,
    "layers/factor.py": "FACTOR = 3.0\n",
    "models/__init__.py": "",
    "models/inner/__init__.py": "",
    "models/inner/configuration_inner.py": """
        from transformers import PreTrainedConfig


        class InnerConfig(PreTrainedConfig):
            model_type = "toygenes_inner"

            def __init__(self, hidden_size=4, **kwargs):
                self.hidden_size = hidden_size
                super().__init__(**kwargs)
        """,
    "models/inner/modeling_inner.py": """
        from torch import nn
        from transformers import PreTrainedModel

        from toygenes.layers.scale import scale
        from toygenes.models.inner.configuration_inner import InnerConfig


        class InnerModel(PreTrainedModel):
            config_class = InnerConfig

            def __init__(self, config):
                super().__init__(config)
                self.embedding = nn.Embedding(9, config.hidden_size)
                self.post_init()

            def forward(self, input_ids):
                return (scale(self.embedding(input_ids)),)
        """,
    "models/outer/__init__.py": "",
    "models/outer/configuration_outer.py": """
        from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig


        class OuterConfig(PreTrainedConfig):
            model_type = "toygenes_outer"
            sub_configs = {"trunk": AutoConfig}

            def __init__(self, trunk=None, vocab_size=9, **kwargs):
                if isinstance(trunk, dict):
                    trunk = CONFIG_MAPPING[trunk["model_type"]](**trunk)
                self.trunk = trunk
                self.vocab_size = vocab_size
                super().__init__(**kwargs)
        """,
    "models/outer/modeling_outer.py": """
        from torch import nn
        from transformers import AutoModel, PreTrainedModel

        from toygenes.models.outer.configuration_outer import OuterConfig


        class OuterModel(PreTrainedModel):
            config_class = OuterConfig

            def __init__(self, config):
                super().__init__(config)
                self.trunk = AutoModel.from_config(config.trunk)
                self.head = nn.Linear(config.trunk.hidden_size, 2)
                self.post_init()

            def forward(self, input_ids):
                return (self.head(self.trunk(input_ids)[0]),)
        """,
}


def write_package(folder):
    """Write `toygenes` under `folder` and return its root."""
    root = folder / "toygenes"
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
    return root


def load(name):
    """A class of the package by its short module name."""
    module, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(f"toygenes.{module}"), cls)
