"""What the Serve application hands to its deployments; nothing is started.

Does not cover: running it (`cluster_lifecycle_test.py`, `tests/engine/cluster_live_test.py`).
"""

import pytest

from cluster.settings import read_settings

# Not the mark `ray`: no Ray is started. Its import alone warns.
pytestmark = pytest.mark.filterwarnings("ignore")

SECRET_HEX = "ab" * 32


@pytest.fixture
def router_of(monkeypatch, tmp_path):
    from cluster.app import Runtime, application

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEARNONCE_CONFIG", raising=False)
    monkeypatch.setenv("LEARNONCE_API_KEYS", "k1")

    def make(*overrides):
        settings = read_settings(None, ["engine.kind=noop", *overrides])
        runtime = Runtime(runtime_dir="somewhere", secret_hex=SECRET_HEX)
        return application(settings, runtime)._bound_deployment

    return make


def test_a_router_on_a_ray_of_others_gets_the_secret_and_the_api_keys(router_of):
    environment = router_of("cluster.address=auto").ray_actor_options["runtime_env"]["env_vars"]
    assert environment == {"LEARNONCE_CLUSTER_SECRET": SECRET_HEX, "LEARNONCE_API_KEYS": "k1"}


def test_a_local_router_inherits_them(router_of):
    assert "runtime_env" not in router_of().ray_actor_options


def test_the_router_logs_as_the_settings_say(router_of):
    assert router_of("log.level=DEBUG", "log.json_lines=true").init_kwargs == {"log_level": "DEBUG", "log_json": True}
