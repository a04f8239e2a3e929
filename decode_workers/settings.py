"""Settings of the decode workers.

Covers: checking plans, calling prefill replicas, the warm-up. Does not cover: the engine (`kvstore.engine.settings`).
"""

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from cluster.settings_base import SettingsBase
from kvstore.engine.worker import LifeSettings


class DecodeSettings(SettingsBase):
    """How decode replicas serve requests. What the engine computes with is in the engine's settings."""

    require_plan: bool = True
    """Refuse requests without a signed plan: API keys are checked where plans are made, at the ingress."""
    max_body_bytes: PositiveInt = 64 << 20
    """Longest request body, in bytes."""
    prefill_connect_s: PositiveFloat = 1.0
    """Seconds for opening a connection to a prefill replica before the next one is tried."""
    prefill_connections: PositiveInt = 256
    """Connections to prefill replicas that may be open at once."""
    chat_template: str | None = None
    """File of a chat template; None takes the model's own."""
    warmup_tokens: NonNegativeInt = Field(default=64, le=4096)
    """Prompt tokens of the request that is generated, saved and loaded once before the replica is ready."""
    life: LifeSettings = LifeSettings()
    """Draining, engine death, store refresh."""
