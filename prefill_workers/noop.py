"""The prefill role on the no-op engine.

Covers: one call into it. Does not cover: the engine (`kvstore.engine.noop`), queueing (`prefill_workers.app`).
"""

from kvstore.engine.noop import NoopEngine, NoopRequest
from kvstore.keys import tenant_of
from prefill_workers.plan import PrefillWork


class NoopPrefillEngine(NoopEngine):
    """A no-op engine that fills the store."""

    async def prefill(self, work: PrefillWork) -> int:
        """Load, wait as long as computing would take, save.

        Returns:
            Prompt tokens that were not "computed".
        """
        request = NoopRequest(
            prompt=work.prompt_token_ids,
            load=work.load,
            save=work.save,
            load_deadline_s=work.load_deadline_s,
            tenant=tenant_of(work.cache_salt),
            max_tokens=1,
        )
        reused = 0
        async for token in self.generate(request):
            reused = token.cached_tokens
        return reused
