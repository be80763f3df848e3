"""OpenAI's grader JSON gives the grades that its reference describes."""

import asyncio
import inspect
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from rlpost.errors import PluginError, RowError
from rlpost.reward import RewardSpec, recorded
from rlpost.scoring import graders, similarity
from rlpost.scoring.pool import ScoringPool
from rlpost.types import Task

TASK = Task(
    id="1", messages=[], answer={"total": "12.50"}, meta={"city": "Paris", "tags": ["a", "b"]}
)
OUT = "{{sample.output_text}}"


def grade(tmp_path, grader, reply, **connection):
    file = tmp_path / "grader.json"
    file.write_text(json.dumps(grader))
    return graders.load(file, **connection)(TASK, recorded(TASK, reply))


def check(operation, text=OUT, reference="{{item.city}}"):
    return {
        "type": "string_check",
        "name": "c",
        "operation": operation,
        "input": text,
        "reference": reference,
    }


@pytest.mark.parametrize(
    ("operation", "reply", "expected"),
    [
        ("eq", "Paris", 1.0),
        ("eq", "paris", 0.0),
        ("ne", "Rome", 1.0),
        ("ne", "Paris", 0.0),
        ("like", "in Paris.", 1.0),
        ("like", "in paris.", 0.0),
        ("ilike", "in PARIS.", 1.0),
    ],
)
def test_string_checks(tmp_path, operation, reply, expected):
    assert grade(tmp_path, check(operation), reply).value == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{item.answer.total}}", "12.50"),
        ("{{ item.total }}", "12.50"),
        ("{{item.tags[1]}}", "b"),
        ("{{sample.output_json.total}}", "3"),
        ("{{sample.choices[0].message.content}}", '{"total": 3}'),
        ("{{sample.output_json.missing}}", ""),
        ("a {{item.city}} b {{item.city}}", "a Paris b Paris"),
    ],
)
def test_templates_read_reply_and_row(tmp_path, template, expected):
    assert grade(tmp_path, check("eq", template, expected), '{"total": 3}').value == 1.0


def test_a_template_that_the_row_does_not_fill_is_the_rows_fault(tmp_path):
    with pytest.raises(RowError, match=r"the row has no 'item\.town'"):
        grade(tmp_path, check("eq", OUT, "{{item.town}}"), "x")


@pytest.mark.parametrize("metric", sorted(similarity.METRICS))
def test_every_similarity_is_1_for_equals_and_low_for_strangers(tmp_path, metric):
    grader = {
        "type": "text_similarity",
        "name": "s",
        "input": OUT,
        "reference": "the quick brown fox jumps over the lazy dog",
        "evaluation_metric": metric,
        "pass_threshold": 0.9,
    }
    same = grade(tmp_path, grader, "the quick brown fox jumps over the lazy dog")
    assert same.value == pytest.approx(1.0) and same.parts == {"passed": 1.0}
    other = grade(tmp_path, grader, "zzz qqq")
    assert other.value < 0.3 and other.parts == {"passed": 0.0}
    assert 0.0 <= grade(tmp_path, grader, "").value < 0.3


def test_rouge_l_counts_the_longest_common_subsequence():
    # police killed the gunman / police kill the gunman: LCS 3 of 4 words (Lin 2004)
    assert similarity.rouge_l("police kill the gunman", "police killed the gunman") == 0.75
    assert similarity.rouge("police kill the gunman", "police killed the gunman", n=2) == (
        pytest.approx(1 / 3)
    )


def test_python_graders_run_their_grade_function(tmp_path):
    source = "def grade(sample, item):\n    return float(item['city'] in sample['output_text'])\n"
    grader = {"type": "python", "name": "p", "source": source}
    assert grade(tmp_path, grader, "to Paris").value == 1.0
    assert grade(tmp_path, grader, "to Rome").value == 0.0


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("0.75 * same + 0.25 * near", 0.25),
        ("max(same, near) - min(same, near)", 1.0),
        ("same ^ 2 + near / 2", 0.5),
        ("-same + exp(0) * sqrt(near)", 1.0),
    ],
)
def test_multi_graders_calculate(tmp_path, formula, expected):
    inner = {"same": check("eq"), "near": check("ilike")}
    grader = {"type": "multi", "name": "m", "graders": inner, "calculate_output": formula}
    score = grade(tmp_path, grader, "in paris")
    assert score.value == pytest.approx(expected)
    assert score.parts == {"same": 0.0, "near": 1.0}


def test_a_division_by_zero_is_not_a_number_and_so_an_invalid_result(tmp_path):
    grader = {"type": "multi", "graders": {"a": check("eq")}, "calculate_output": "1 / a"}
    assert math.isnan(grade(tmp_path, grader, "x").value)


@pytest.mark.parametrize(
    ("grader", "message"),
    [
        ([], "type 'list' is not known"),
        ({"type": "strng_check"}, "types are string_check"),
        (check("equals"), "operation 'equals' is not known"),
        ({"type": "string_check", "operation": "eq", "input": "x"}, "needs 'reference'"),
        (
            {"type": "text_similarity", "evaluation_metric": "cosine"},
            "metric 'cosine' is not offered",
        ),
        ({"type": "python", "source": "def grade(:"}, "does not run"),
        ({"type": "python", "source": "x = 1"}, "no function grade"),
        (
            {"type": "multi", "graders": {"a": check("eq")}, "calculate_output": "a + b"},
            "'b' is not allowed",
        ),
        (
            {
                "type": "multi",
                "graders": {"a": check("eq")},
                "calculate_output": "__import__('os').getcwd()",
            },
            "is not allowed",
        ),
        ({"type": "score_model", "model": "m", "input": []}, "needs an endpoint"),
    ],
)
def test_a_wrong_grader_is_told_when_it_is_loaded(tmp_path, grader, message):
    with pytest.raises(PluginError, match=message) as caught:
        grade(tmp_path, grader, "x")
    assert "grader.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_grader_file_that_is_not_there_or_not_json(tmp_path):
    with pytest.raises(PluginError, match="cannot be read"):
        graders.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{\n"type": }')
    with pytest.raises(PluginError, match="line 2"):
        graders.load(tmp_path / "bad.json")


class Model(BaseHTTPRequestHandler):
    """Answers with the length of the reply it was shown."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        shown = body["messages"][0]["content"].removeprefix("Rate: ")
        content = "no idea" if shown == "?" else json.dumps({"result": len(shown)})
        answer = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(500 if shown == "broken" else 200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    server = HTTPServer(("127.0.0.1", 0), Model)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def score_model(tmp_path):
    grader = {
        "type": "score_model",
        "name": "rater",
        "model": "m",
        "input": [{"role": "user", "content": "Rate: " + OUT}],
        "range": [0, 10],
    }
    (tmp_path / "rater.json").write_text(json.dumps(grader))
    return tmp_path / "rater.json"


async def test_score_model_asks_its_endpoint_and_maps_the_range(tmp_path, endpoint):
    reward = graders.load(score_model(tmp_path), endpoint=endpoint)
    assert inspect.iscoroutinefunction(reward)
    values = await asyncio.gather(*(reward(TASK, recorded(TASK, "x" * n)) for n in (0, 5, 10)))
    assert [score.value for score in values] == [0.0, 0.5, 1.0]


async def test_a_broken_endpoint_leaves_the_rollout_unscored(tmp_path, endpoint):
    score_model(tmp_path)
    arguments = {"endpoint": endpoint, "timeout": 5.0}
    spec = RewardSpec(use="rater.json", name="r", arguments=arguments, base_dir=str(tmp_path))
    async with ScoringPool([spec]) as pool:
        scored = await pool.score([recorded(TASK, text) for text in ("xxxxx", "broken", "?")])
        assert "HTTP Error 500" in pool.failures[0].detail
    assert [(r.status, r.score and r.score.value) for r in scored] == [
        ("ok", 0.5),
        ("error", None),
        ("error", None),
    ]


async def test_a_key_is_named_by_its_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("RLPOST_NO_KEY", raising=False)
    with pytest.raises(PluginError, match="RLPOST_NO_KEY is not set"):
        graders.load(score_model(tmp_path), endpoint="http://x", api_key_env="RLPOST_NO_KEY")
