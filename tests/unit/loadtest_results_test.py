"""Result files hold what makes a figure worth quoting."""

import json

from loadtest.results import result, write_result


def test_result_has_facts_and_flat_figures(tmp_path):
    content = result({"cold_ttft_s": 12.5}, runs={"cold": [12.0, 12.5, 13.0]})
    for name in ("hardware", "versions", "command", "commit", "figures", "runs"):
        assert content[name], name
    assert content["figures"] == {"cold_ttft_s": 12.5}
    assert content["hardware"]["cores"] >= 1
    assert "python" in content["versions"]
    write_result(tmp_path / "r.json", content)
    assert json.loads((tmp_path / "r.json").read_text()) == content
