"""Answers of the tree that are nobody's failure: what a caller asked for does not exist or is not allowed."""

from __future__ import annotations

import errno as _errno

from qedfs.errors import QedfsError


class TreeError(QedfsError):
    """The caller's fault."""


class NoSuchFile(TreeError):
    """No leaf has this name."""

    errno = _errno.ENOENT


class Gone(TreeError):
    """The leaf was removed and its last user is done; only an old reference still names it."""

    errno = _errno.ESTALE


class NotPermitted(TreeError):
    """The operation does not exist here (create, unlink, chmod, O_TRUNC, …)."""

    errno = _errno.EPERM


class NoSuchAttribute(TreeError):
    """The extended attribute does not exist."""

    errno = _errno.ENODATA


class AttributeAccess(TreeError):
    """A write to a read-only attribute, or a read of a write-only one."""

    errno = _errno.EACCES


class NotSupported(TreeError):
    """A good request that nothing can honour yet, or an attribute of a foreign namespace."""

    errno = _errno.EOPNOTSUPP
