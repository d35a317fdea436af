"""Classes of transformers that an original's checkpoint becomes, by their names."""

from collections.abc import Iterator, Mapping

import transformers
from transformers import PreTrainedModel


class TransformersClasses(Mapping[str, type[PreTrainedModel]]):
    """task -> class of transformers by name; its module is imported when the class is asked for, not before."""

    def __init__(self, **names: str) -> None:
        self.names = names

    def __getitem__(self, task: str) -> type[PreTrainedModel]:
        return getattr(transformers, self.names[task])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
