"""URLs of buckets: which are understood, and by which client library.

Covers: their form. Does not cover: options and credentials (`kvstore.tiers.obs_clients`, `kvstore.tiers.arrow`),
whether there is such a bucket.
"""

from typing import Final
from urllib.parse import SplitResult, urlsplit

from cluster.errors import SettingsError

ARROW_PREFIX: Final = "arrow+"
S3_SCHEMES: Final = ("s3", "s3a")
_OBSTORE_SCHEMES: Final = (*S3_SCHEMES, "gs", "az", "adl", "azure", "abfs", "abfss", "file")
_ARROW_SCHEMES: Final = ("file", "hdfs", "s3", "gs")
_HOSTLESS: Final = ("file", "hdfs")
"""Of a folder there is no host, and HDFS has a default one."""


def split_object_url(url: str) -> SplitResult:
    """The parts of a bucket's URL, without `arrow+`.

    Raises:
        SettingsError: Another scheme, no bucket or folder, secrets inside; the message repeats none.

    Example:
        >>> split_object_url("arrow+file:///mnt/nfs").path, split_object_url("s3://bucket/prefix").netloc
        ('/mnt/nfs', 'bucket')
    """
    is_arrow = url.startswith(ARROW_PREFIX)
    try:
        parts = urlsplit(url.removeprefix(ARROW_PREFIX))
        has_port = parts.port is not None
    except ValueError:
        raise SettingsError("no URL; for example s3://bucket/prefix, file:///folder") from None
    if parts.username or parts.password or parts.query:
        raise SettingsError("credentials and queries do not belong into a URL; use the environment")
    if "#" in url:
        # It would be cut off, and records would go to another prefix than the one that was written down.
        raise SettingsError("a URL of a bucket ends with its prefix or folder; there is a # in this one")
    shown = f"{ARROW_PREFIX if is_arrow else ''}{parts.scheme}"
    schemes = _ARROW_SCHEMES if is_arrow else _OBSTORE_SCHEMES
    if parts.scheme not in schemes:
        # Without a scheme nothing is shown: what stands in front may be a key.
        seen = repr(parts.scheme) if parts.scheme else "a URL without a scheme"
        raise SettingsError(
            f"{seen} is not understood; obstore speaks {_listed(_OBSTORE_SCHEMES)}, pyarrow "
            f"{_listed(_ARROW_SCHEMES, ARROW_PREFIX)}"
        )
    if parts.scheme == "file":
        folder = f"{parts.netloc}{parts.path}".strip("/")
        if parts.netloc or not parts.path.startswith("/") or not folder:
            raise SettingsError(
                f"a folder has three slashes and a name: {shown}:///{folder or 'folder'}"
                + (" (it is absolute)" if folder else "")
            )
    elif not parts.netloc and parts.scheme not in _HOSTLESS:
        raise SettingsError(f"no bucket in it; for example {shown}://bucket/prefix")
    elif has_port and parts.scheme != "hdfs":
        raise SettingsError(f"a bucket has no port; a server is named in options: endpoint ({shown} given)")
    return parts


def _listed(schemes: tuple[str, ...], prefix: str = "") -> str:
    return ", ".join(f"{prefix}{scheme}://" for scheme in schemes)
