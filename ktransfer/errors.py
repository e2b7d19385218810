"""The errors that end a command. Every message is one line: what was given, which rule it breaks, the way out."""


class KTransferError(Exception):
    """Base of all errors that are meant for people; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(KTransferError):
    """What was asked for cannot be done (exit code 2); found before the work wherever that is possible."""

    exit_code = 2


class StageError(KTransferError):
    """A stage failed while it ran (exit code 1): what earlier stages wrote stays whole."""


class Reply(KTransferError):
    """No error: what was asked for is the message, which goes to stdout, and nothing else is done (exit code 0)."""

    exit_code = 0


class Stopped(KTransferError):
    """Ctrl-C between two steps: the run can go on, and the message says how."""

    exit_code = 130


class BrokenImage(KTransferError):
    """One image cannot be read; the message is the reason that is recorded for it."""
