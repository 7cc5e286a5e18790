"""The base of every error that a person is told."""

import errno


class FaasError(Exception):
    """What went wrong, as one line; `hint` says what to do, `status` is the HTTP status of the answer."""

    status = 500
    hint: str | None = None

    def __init__(self, text: str, hint: str | None = None) -> None:
        super().__init__(text)
        self.hint = hint or self.hint


# What can fail because of the machine or of a person, and not because of a fault in the code.
EXPECTED = (FaasError, OSError)


class StartError(FaasError):
    """faasd cannot start. With `exit_code` os.EX_CONFIG another try would not help."""

    exit_code = 1


def is_scarce(error: OSError) -> bool:
    """True if the process or the host ran out of something. Then the error says nothing about what was asked for."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
