"""The boards and rules as files: made from the code, and about the metrics that there are."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlpost.metric_table import CHECKS, METRICS

FOLDER = Path(__file__).parents[2] / "dashboards"
BOARDS = {
    name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("training", "rollout", "rewards")
}
PANELS = [
    (board, panel)
    for board, content in BOARDS.items()
    for panel in content["panels"]
    if panel["type"] != "row"
]
GROUPS = yaml.safe_load((FOLDER / "rules.yml").read_text(encoding="utf-8"))["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
DECLARED = {f"rlpost_{metric.name}" for metric in METRICS}
RUNBOOKS = set(
    re.findall(r"^## (\w+)$", (FOLDER / "RUNBOOKS.md").read_text(encoding="utf-8"), re.M)
)


def metrics_in(text):
    """Declared names in an expression; what a recording rule makes is not one."""
    names = re.findall(r"(?<![:\w])rlpost_[a-z_]+", text)
    series = {f"{name}{end}": name for name in DECLARED for end in ("_bucket", "_sum", "_count")}
    return {name if name in DECLARED else series.get(name, name) for name in names}


def on_boards():
    return {
        name for _, panel in PANELS for target in panel["targets"]
        for name in metrics_in(target["expr"])
    }  # fmt: skip


def name_of(case):
    return f"{case[0]}: {case[1]['title']}"


def test_the_committed_files_are_what_the_code_makes():
    if importlib.util.find_spec("grafana_foundation_sdk") is None:
        pytest.skip("grafana-foundation-sdk is not installed")
    command = [sys.executable, str(FOLDER / "code" / "build.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_declared_metric_is_on_a_board():
    assert DECLARED - on_boards() == set()


def test_every_metric_on_a_board_or_in_a_rule_is_declared():
    in_rules = {name for rule in RULES for name in metrics_in(rule["expr"])}
    assert (on_boards() | in_rules) - DECLARED == set()


@pytest.mark.parametrize("case", PANELS, ids=name_of)
def test_a_panel_says_what_it_reads_what_it_means_and_what_to_do(case):
    _, panel = case
    text = panel["description"]
    for target in panel["targets"]:
        for name in metrics_in(target["expr"]):
            assert f"`{name}`" in text
        assert 'run_id=~"$run_id"' in target["expr"]
        assert target["datasource"]["uid"] == panel["datasource"]["uid"] == "$datasource"
        assert target["legendFormat"]
    meaning, _, advice = text.partition("**Do:** ")
    assert len(meaning) > 30 and len(advice) > 10
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["fieldConfig"]["defaults"]["noValue"] == "No traffic"


@pytest.mark.parametrize("board", BOARDS)
def test_panels_of_a_board_have_numbers_of_their_own_and_do_not_overlap(board):
    panels = BOARDS[board]["panels"]
    ids = [panel["id"] for panel in panels if panel["type"] != "row"]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


@pytest.mark.parametrize("board", BOARDS)
def test_a_board_serves_one_run_or_all_from_any_data_source(board):
    source, run = BOARDS[board]["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == (
        "datasource", "datasource", "prometheus",
    )  # fmt: skip
    assert (run["name"], run["includeAll"], run["multi"]) == ("run_id", True, True)
    assert any(link.get("url") == "/d/rayDefaultDashboard" for link in BOARDS[board]["links"])


def test_every_check_of_health_has_a_runbook():
    assert set(CHECKS) - RUNBOOKS == set()


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_leads_to_its_runbook(alert):
    rule = ALERTS[alert]
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert page == "dashboards/RUNBOOKS.md"
    if alert != "RlpostHealth":  # takes check and severity from the run's own series
        assert rule["labels"]["check"] == anchor
        assert anchor in RUNBOOKS
        assert rule["labels"]["severity"] in ("warning", "critical")
    assert "run_id" in rule["annotations"]["summary"]


def test_no_runbook_is_about_nothing():
    watched = {rule["labels"]["check"] for rule in ALERTS.values() if "labels" in rule}
    assert watched | set(CHECKS) == RUNBOOKS


@pytest.mark.parametrize(
    "command",
    [
        "promtool check config prometheus.yml",
        "promtool check rules --lint=all --lint-fatal rules.yml",
        pytest.param("promtool test rules rules_test.yml", marks=pytest.mark.slow),
        "amtool check-config alertmanager.yml",
    ],
)
def test_the_tools_find_nothing_to_mend(command):
    tool, *arguments = command.split()
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    checked = subprocess.run([tool, *arguments], cwd=FOLDER, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_rule_that_is_wrong_is_found(tmp_path):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    rules = (FOLDER / "rules.yml").read_text(encoding="utf-8")
    tests = yaml.safe_load((FOLDER / "rules_test.yml").read_text(encoding="utf-8"))
    tests["tests"] = [t for t in tests["tests"] if t["name"] == "RlpostMismatchCritical fires"]
    (tmp_path / "rules_test.yml").write_text(yaml.safe_dump(tests), encoding="utf-8")
    command = ["promtool", "test", "rules", "rules_test.yml"]
    for threshold, wrong in (("0.1", False), ("1", True)):
        changed = rules.replace("rlpost_rollout_kl > 0.1", f"rlpost_rollout_kl > {threshold}")
        (tmp_path / "rules.yml").write_text(changed, encoding="utf-8")
        tested = subprocess.run(command, cwd=tmp_path, capture_output=True)
        assert (tested.returncode != 0) == wrong
