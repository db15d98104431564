"""Everything that can go wrong for a user's reason, one class and one exit code a cause.

    MeanSparseError            1   what nobody foresaw: a fault of this program, or of code that a model brings
    ├── ConfigError            3   a setting that cannot be used (alpha below 0, eps of 8, unknown key)
    ├── ModelNotFound          4   unknown or ambiguous model name
    ├── DownloadError          5   the weights could not be fetched whole
    ├── CheckpointError        6   a file of weights that is corrupt, unsafe or of another model
    ├── DataError              7   images missing, of the wrong size, class count or range
    ├── SiteError              8   no activation found, or sites that depend on the input
    ├── StatisticsError        9   a site without data, NaN, a channel count that changes
    ├── ArtifactError         10   a report missing, edited, or of other inputs
    ├── StorageError          11   the disk is full, or a file or folder cannot be written or read
    └── AttackError           12   an attack that cannot run on this model

A message says what was found, what was expected, and the command that puts it right. The library raises; only
``cli`` turns it into a message and an exit code. 2 is Typer's own code for wrong usage, 130 that of Ctrl-C.
"""

import errno
import os

_REMEDIES = {
    "free some space or choose another --run, then type the same command again": ("ENOSPC", "EDQUOT"),
    "see who may write there (ls -ld, lsattr), or choose another --run": ("EROFS", "EACCES", "EPERM"),
    "links lead in a circle there: give the folder itself": ("ELOOP",),
    "choose a shorter name": ("ENAMETOOLONG",),
    "move what is in its place, or choose another name": ("EISDIR", "ENOTDIR", "EEXIST", "ENOTEMPTY"),
    "see whether the folder that you are in is still there: cd DIR": ("ENOENT", "ESTALE"),
    "see whether the disk or the network is well, then type the same command again": ("EIO", "ENXIO", "ETIMEDOUT"),
}
"""What can be done about an error of the system; of any other, what can be done about a disk that is full."""


class MeanSparseError(Exception):
    """Root of every error this package raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class ConfigError(MeanSparseError):
    exit_code = 3


class ModelNotFound(MeanSparseError):
    exit_code = 4


class DownloadError(MeanSparseError):
    exit_code = 5


class CheckpointError(MeanSparseError):
    exit_code = 6


class DataError(MeanSparseError):
    exit_code = 7


class SiteError(MeanSparseError):
    exit_code = 8


class StatisticsError(MeanSparseError):
    exit_code = 9


class ArtifactError(MeanSparseError):
    exit_code = 10


class StorageError(MeanSparseError):
    exit_code = 11

    @classmethod
    def of(cls, error: OSError, what: str | None = None, *, hint: str | None = None) -> "StorageError":
        """Any error of the system in words: ``what`` failed (else its file is named), why, and what can be done."""
        try:
            os.getcwd()
        except OSError:
            return cls("the folder that this was started in is gone", hint="type the same command in another one")
        name, reason = errno.errorcode.get(error.errno or 0, ""), error.strerror or str(error) or type(error).__name__
        message = f"{what}: {reason}" if what else f"{reason}: {error.filename or 'a file could not be written'}"
        remedy = next((words for words, names in _REMEDIES.items() if name in names), next(iter(_REMEDIES)))
        return cls(message, hint=hint or f"nothing finished was lost: {remedy}")


class AttackError(MeanSparseError):
    exit_code = 12
