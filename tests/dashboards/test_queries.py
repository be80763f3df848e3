"""A real Prometheus scrapes a run's endpoint and answers every query of every panel, variable and
rule; a real Alertmanager carries a sick run's alerts to a webhook."""

import http.server
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from rlpost.metrics import RunMetrics
from rlpost.types import Group, Rollout, Score, StepReport, Task, Trajectory

FOLDER = Path(__file__).parents[2] / "dashboards"
BOARDS = [
    json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("training", "rollout", "rewards")
]
QUERIES = sorted(
    {
        target["expr"]
        for board in BOARDS
        for panel in board["panels"]
        for target in panel.get("targets", [])
    }
)
RULES = [
    rule
    for group in yaml.safe_load((FOLDER / "rules.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule["expr"] for rule in RULES if "alert" in rule}

MAY_BE_EMPTY: dict[str, str] = {}  # query: the reason. None is needed: every series is there
FILLING = 12.0  # seconds of a run before anything is asked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
    # one Prometheus and Alertmanager for all of these, where the runner keeps groups together
    pytest.mark.xdist_group("prometheus"),
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def groups(number):
    """Three groups: mixed, all good, all bad; two parts each."""
    made = []
    for scores in ((0.0, 1.0), (0.9, 0.9), (0.1, 0.1)):
        rollouts = []
        for position, score in enumerate(scores):
            length = 20 + 10 * position + number % 7
            trajectory = Trajectory(
                token_ids=[0] * (30 + length), loss_mask=[0] * 30 + [1] * length,
                logprobs=[0.0] * (30 + length), policy_version=number,
            )  # fmt: skip
            judged = Score(value=score, parts={"parses": 1.0, "exact.date": score})
            rollouts.append(
                Rollout(task=Task(id="t", messages=[]), reply="", trajectory=trajectory,
                        score=judged, status="ok",
                        stop_reason="length" if number % 9 == 8 else "stop")
            )  # fmt: skip
        made.append(Group(id=number, task=rollouts[0].task, rollouts=rollouts))
    return made


def train(metrics, number, *, sick=False):
    """One update of a plausible run, as the controller would tell it."""
    gathered = groups(number)
    for group in gathered:
        metrics.collected(group)
    metrics.buffered(running=4, finished=2)
    metrics.published(seconds=0.2, proof_seconds=0.1, slope=1.0, power=0.95, bytes=10_000)
    kl = 0.5 if sick else 0.001
    metrics.diverged(kl=kl, probability_gap=kl)
    metrics.clipped(low=0.01, high=0.02)
    metrics.roofline("generate", 0.18)
    for role in ("rollout", "learner"):
        metrics.hardware(role, used_bytes=6e10, size_bytes=8e10, busy=0.7)
    metrics.disk(free_bytes=5e11, size_bytes=1e12)
    report = StepReport(
        policy_version=number, loss=0.1, grad_norm=1 + 0.1 * (number % 3), entropy=0.5,
        clip_fraction=0.03, logprob_gap=0.01, kl=0.02 + 0.001 * (number % 3), tokens=200,
        seconds=0.2, learning_rate=1e-5, skipped="loss is not finite" if sick else "",
    )  # fmt: skip
    scoring = {"restarts": number // 10, "calls": {"extraction": {"ok": 6 * number, "timeout": 0}},
               "seconds": {"extraction": 0.01 * number}}  # fmt: skip
    worker = {"prompt_tokens": 180 * number, "completion_tokens": 150 * number,
              "idle_seconds": 0.02 * number, "scoring": scoring}  # fmt: skip
    metrics.updated(
        update=number, report=report, groups=gathered, staleness=1, learner_wait=0.02,
        dropped={"late": 0}, workers=[worker], min_spread=0.02, seconds=0.25, eta=30.0,
    )  # fmt: skip
    if number % 5 == 1:
        metrics.evaluated(0.4 + 0.001 * number, {"exact_f1": 0.3}, update=number)
        metrics.saved(0.1)


class Receiver(http.server.BaseHTTPRequestHandler):
    """The webhook: keeps every alert that it is told of."""

    told: list[dict]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.told.extend(json.loads(body)["alerts"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


class Prometheus:
    """Speaks to the API of the Prometheus that the fixture has started."""

    def __init__(self, port, told):
        self.address, self.told = f"http://127.0.0.1:{port}", told

    def get(self, path, **arguments):
        url = f"{self.address}{path}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{arguments}: {error.read().decode()}") from None

    def ask(self, expr, run="healthy"):
        """The result of an instant query, Grafana's variables filled in as Grafana does."""
        expr = expr.replace("$__rate_interval", "8s").replace("$run_id", run)
        assert "$" not in expr, f"a variable that the test does not know: {expr}"
        return self.get("/api/v1/query", query=expr)["result"]


def configure(folder, alertmanager, webhook):
    """The committed configuration, in a hurry: every interval a second or less."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
    manager = {"static_configs": [{"targets": [f"127.0.0.1:{alertmanager}"]}]}
    config["alerting"]["alertmanagers"] = [manager]
    config["scrape_configs"] = [c for c in config["scrape_configs"] if c["job_name"] == "rlpost"]
    rules = yaml.safe_load((FOLDER / "rules.yml").read_text(encoding="utf-8"))
    for group in rules["groups"]:
        group["interval"] = "1s"
    notify = yaml.safe_load((FOLDER / "alertmanager.yml").read_text(encoding="utf-8"))
    notify["receivers"][0]["webhook_configs"][0]["url"] = f"http://127.0.0.1:{webhook}/alerts"
    for name, content in (("prometheus", config), ("rules", rules), ("alertmanager", notify)):
        (folder / f"{name}.yml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (folder / "targets").mkdir()


def start(folder, port, alertmanager):
    """Prometheus and, where it is installed, Alertmanager."""
    commands = [["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data",
                 f"--web.listen-address=127.0.0.1:{port}"]]  # fmt: skip
    program = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    if program:
        commands.append([program, "--config.file=alertmanager.yml", "--storage.path=alerts",
                         f"--web.listen-address=127.0.0.1:{alertmanager}",
                         "--cluster.listen-address="])  # fmt: skip
    with (folder / "log").open("wb") as log:
        return [subprocess.Popen(c, cwd=folder, stdout=log, stderr=log) for c in commands]


def add_target(folder, metrics):
    host = urllib.parse.urlsplit(metrics.serve()).netloc
    entry = [{"targets": [host], "labels": {"run_id": metrics.run_id}}]
    fresh = folder / "targets" / "new"
    fresh.write_text(json.dumps(entry), encoding="utf-8")
    fresh.rename(folder / "targets" / f"{metrics.run_id}.json")


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """A Prometheus that has scraped two runs, `healthy` and `sick`, for a while; they go on."""
    folder = tmp_path_factory.mktemp("prometheus")
    port, alertmanager = free_port(), free_port()
    handler = type("Told", (Receiver,), {"told": []})
    webhook = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=webhook.serve_forever, daemon=True).start()
    configure(folder, alertmanager, webhook.server_port)
    runs, stop = [RunMetrics("healthy"), RunMetrics("sick")], threading.Event()
    processes = start(folder, port, alertmanager)
    try:
        for metrics in runs:
            metrics.configured(updates=1000, staleness=1)
            metrics.phase("training")
            add_target(folder, metrics)
        threading.Thread(target=_go_on, args=(runs, stop), daemon=True).start()
        speaker = Prometheus(port, handler.told)
        _wait(lambda: len(speaker.ask("rlpost_update")) == 2, folder)
        time.sleep(FILLING)
        yield speaker
    finally:
        stop.set()
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=30)
        for metrics in runs:
            metrics.close()
        webhook.shutdown()


def _go_on(runs, stop):
    number = 0
    while not stop.wait(0.25):
        number += 1
        for metrics in runs:
            train(metrics, number, sick=metrics.run_id == "sick")


def _wait(condition, folder, seconds=60):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if condition():
                return
        except OSError:  # it does not listen yet
            pass
        time.sleep(0.2)
    raise AssertionError(f"Prometheus saw no run: {(folder / 'log').read_text()[-2000:]}")


def numbers(result):
    return [series["value"][1] for series in result if series["value"][1] != "NaN"]


@pytest.mark.parametrize("expr", QUERIES)
@pytest.mark.parametrize("run", ["healthy", ".*"], ids=["one run", "all runs"])
def test_the_query_of_a_panel_has_an_answer(prometheus, expr, run):
    result = prometheus.ask(expr, run)
    if expr not in MAY_BE_EMPTY:
        assert numbers(result), f"empty or NaN only: {expr}"
    assert all(s["metric"].get("run_id", "healthy") == "healthy" for s in result) or run == ".*"


def test_the_variable_lists_every_run(prometheus):
    for board in BOARDS:
        query = board["templating"]["list"][1]["query"]["query"]
        name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()
        found = prometheus.get(f"/api/v1/label/{label}/values", **{"match[]": name})
        assert found == ["healthy", "sick"]


@pytest.mark.parametrize("name", RECORDED)
def test_a_recording_rule_has_an_answer_and_is_recorded(prometheus, name):
    assert numbers(prometheus.ask(RECORDED[name]))
    assert numbers(prometheus.ask(name))


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_reads_series_that_there_are_and_is_silent_on_a_healthy_run(prometheus, alert):
    expr = ALERTS[alert]
    selectors = re.findall(r"((?:\w+:)?rlpost_\w+(?::\w+)?|\bup)(\{[^}]*\})?", expr)
    assert selectors
    for name, matchers in selectors:
        assert prometheus.ask(name + matchers), f"no series: {name}{matchers}"
    fires = prometheus.ask(expr)
    assert [s for s in fires if s["metric"].get("run_id") == "healthy"] == []


def test_prometheus_evaluates_every_rule_without_an_error(prometheus):
    seen = [rule for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    assert len(seen) == len(RULES)
    assert [rule["name"] for rule in seen if rule["health"] != "ok"] == []


def test_a_sick_runs_alerts_reach_the_webhook(prometheus):
    if not (shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")):
        pytest.skip("alertmanager is not installed")
    wanted = {"RlpostNonFiniteUpdate", "RlpostMismatchCritical"}
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        told = {
            (alert["labels"]["alertname"], alert["labels"]["run_id"]) for alert in prometheus.told
        }
        if {(name, "sick") for name in wanted} <= told:
            break
        time.sleep(0.2)
    assert {(name, "sick") for name in wanted} <= told
    assert [run for _, run in told if run != "sick"] == []
    urls = {alert["annotations"]["runbook_url"] for alert in prometheus.told}
    assert "dashboards/RUNBOOKS.md#non_finite" in urls
