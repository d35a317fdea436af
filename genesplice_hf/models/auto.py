"""Auto classes of tasks that transformers has none for; used like its own, after `import genesplice_hf`.

Published bundles name them in `auto_map` as well; without this package such a model is loaded through
`transformers.dynamic_module_utils.get_class_from_dynamic_module`.
"""

from collections import OrderedDict

from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping


class AutoModelForTrackPrediction(_BaseAutoModelClass):
    """Non-negative values per bin and track, from sequence."""

    # Empty but for what is registered with it.
    _model_mapping = _LazyAutoMapping(OrderedDict(), OrderedDict())


class AutoModelForContactPrediction(_BaseAutoModelClass):
    """Values per pair of bins, from sequence."""

    _model_mapping = _LazyAutoMapping(OrderedDict(), OrderedDict())


class AutoModelForMaskedExpression(_BaseAutoModelClass):
    """Values of masked genes, from the other genes of a cell."""

    _model_mapping = _LazyAutoMapping(OrderedDict(), OrderedDict())


class AutoModelForEdgePrediction(_BaseAutoModelClass):
    """Which genes of a cell act on which."""

    _model_mapping = _LazyAutoMapping(OrderedDict(), OrderedDict())
