"""What would keep a store from starting, found out where the person is: before any process is started.

Covers: the key of records at rest, TLS files, URL and options of the bucket. Does not cover: names, types and bounds
(`kvstore.settings`), what a store does without (`kvstore.assembly`): folders and buckets that cannot be used now.
"""

from kvstore.sealing import store_keys
from kvstore.settings import StoreSettings


def check_before_start(settings: StoreSettings, *, is_here: bool) -> None:
    """Look at everything that a store looks at first.

    Args:
        settings: The store's.
        is_here: Whether the store will run on this machine. Files and the clients' environment are looked at only then;
            the key is handed on from here to all nodes.

    Raises:
        SettingsError: What to change.

    Cost:
        Nothing is asked of the bucket; its client loads in some tenths of a second.
    """
    if settings.encrypt_at_rest:
        store_keys()
    if not is_here:
        return
    if settings.tls is not None and settings.peers is not None:
        # Imported here, as below: what is not used need not be loaded.
        from kvstore.tls import check_files

        check_files(settings.tls.absolute())
    if settings.object is not None:
        from kvstore.tiers.object import open_bucket

        open_bucket(settings.object).close()
