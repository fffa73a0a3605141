"""Errors that a person can act on. The command line prints their message and no traceback."""

from __future__ import annotations


class RLHFError(Exception):
    """An expected failure; `exit_code` is the status of the command that meets it."""

    exit_code = 1


class InputError(RLHFError, ValueError):
    """Something given by the user is wrong: a parameter, a file, a row. Trying again will not help."""

    exit_code = 2


class DataRejected(InputError):
    """The data failed a critical expectation; training must not start."""

    exit_code = 3


class LostRankError(RLHFError):
    """Another process of this training is gone."""

    exit_code = 5
