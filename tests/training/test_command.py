"""Scripts end in a message where the error is known, and in a traceback where it is not."""

import pytest
from torch import distributed

from genesplice_hf.errors import DataError
from training.command import run_command


def fails(error: Exception):
    def main():
        raise error

    return main


def test_a_known_error_is_its_message_and_exit_status_1():
    with pytest.raises(SystemExit) as stopped:
        run_command(fails(DataError("`data` must be a file.")))
    assert stopped.value.code == "error: `data` must be a file."


def test_an_unknown_error_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(fails(ZeroDivisionError()))
    assert run_command(lambda: {"results": 1}) is None


def test_the_process_group_ends_with_the_command():
    def main():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)

    run_command(main)
    assert not distributed.is_initialized()
