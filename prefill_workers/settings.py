"""Settings of the prefill workers.

Covers: queueing, waiting, the warm-up. Does not cover: the engine (`kvstore.engine.settings`).
"""

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from cluster.settings_base import SettingsBase
from kvstore.engine.worker import LifeSettings


class PrefillSettings(SettingsBase):
    """How prefill replicas take work. What the engine computes with is in the engine's settings."""

    max_queued_prompt_tokens: PositiveInt = 65_536
    """Prompt tokens accepted and not yet computed, above which new work is refused; an idle replica takes any."""
    save_wait_s: PositiveFloat = 5.0
    """Seconds after the computation in which its chunks must become readable; those that do not are not held."""
    retry_after_s: PositiveFloat = 1.0
    """What a refused decode replica is told to wait."""
    warmup_tokens: NonNegativeInt = Field(default=64, le=4096)
    """Prompt tokens of the request that is run, saved and loaded once before the replica is ready."""
    life: LifeSettings = LifeSettings()
    """Draining, engine death, store refresh."""
