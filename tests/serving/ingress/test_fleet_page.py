"""What an ingress shows on its fleet page."""

from adakv_serve.serving.config import AppConfig
from adakv_serve.serving.ingress.fleet_page import configured_facts


def test_the_page_offers_what_requests_may_ask_for() -> None:
    assert configured_facts(AppConfig())["compression"] is None
    config = AppConfig.model_validate(
        {"compression": {"allow_full": False, "max_budget_tokens": 512, "allow_detail": True}}
    )
    offered = configured_facts(config)["compression"]
    assert {"auto", "kv_compress"} <= set(offered["policies"])
    assert "full" not in offered["policies"]
    assert (offered["min_budget_tokens"], offered["max_budget_tokens"]) == (64, 512)
    assert offered["detail"] is True
