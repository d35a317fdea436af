"""The errors that users of the package meet; every one is a `ValueError` that says what to do."""


class GeneSpliceError(ValueError):
    """Base class: catch it to catch every complaint of this package."""


class SequenceError(GeneSpliceError):
    """A sequence holds a letter, or has a length, that cannot be used as it stands."""


class DataError(GeneSpliceError):
    """A file, table or split is not what it claims to be."""


class CheckpointError(GeneSpliceError):
    """Weights, an adapter or a config do not fit the model that should load them."""


class UnknownCheckpointError(CheckpointError):
    """A checkpoint has the tensors of no architecture that the package knows."""


class PublishError(GeneSpliceError):
    """A folder cannot be made self-contained or sent to a Hub as it stands."""
