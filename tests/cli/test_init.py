import argparse
import csv
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rlpost.cli import init
from rlpost.cli.column_guess import day_comes_first, guess_field, guess_reward
from rlpost.config import read_job
from rlpost.errors import UserError
from rlpost.preparation import read_tasks

DATA = Path(os.environ.get("RLPOST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def run(*arguments):
    parser = argparse.ArgumentParser()
    init.register(parser.add_subparsers())
    args = parser.parse_args(["init", *map(str, arguments)])
    return args.run(args)


def refusal(*arguments):
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert caught.value.exit_code == 2
    return str(caught.value)


def invoices(folder, rows=40):
    path = folder / "rows.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["id", "text", "vendor", "date", "total", "pages", "kind", "paid", "invoice_no"]
        )
        for n in range(rows):
            document = f"INVOICE {{no. {n}}}\nVENDOR {n % 13}\n" + "LINE\n" * 20
            writer.writerow(
                [n, document, f"Vendor {n % 13}", f"{n % 28 + 1:02}/03/2024", f"€ {n},50", n % 7,
                 ["goods", "service"][n % 2], ["true", "false"][n % 2], f"A-{n:04}"]
            )  # fmt: skip
    return path


# ── from rows ──────────────────────────────────────────────────────────────────────────────────


def test_a_job_written_from_rows_is_one_that_reads_them(tmp_path, capsys):
    assert run(tmp_path / "job", "--from", invoices(tmp_path)) == 0
    job = read_job(tmp_path / "job")
    tasks = read_tasks(job, job.data.train)
    assert job.run.name == "job"
    assert job.data.train == "../rows.csv"
    assert len(tasks) == 40
    assert tasks[3].messages[0]["content"].endswith("INVOICE {no. 3}\nVENDOR 3\n" + "LINE\n" * 20)
    assert tasks[3].answer["total"] == "€ 3,50"
    assert job.rewards[0].arguments == {
        "fields": {
            "vendor": "text",
            "date": "date",
            "total": "amount",
            "pages": "number",
            "kind": {"type": "enum", "values": ["goods", "service"]},
            "paid": "boolean",
            "invoice_no": "id",
        },
        "day_first": True,
    }
    assert job.data.split_by == "vendor"
    schema = json.loads((tmp_path / "job" / "schema.json").read_text())
    assert schema["properties"]["kind"] == {"type": "string", "enum": ["goods", "service"]}
    assert schema["required"] == list(job.rewards[0].arguments["fields"])
    said = capsys.readouterr().out
    assert f"rlpost check {tmp_path / 'job'}/job.toml" in said
    assert "taken for the gold: vendor, date, total" in said


def test_named_answer_columns_are_taken_and_the_prompt_shows_the_rest(tmp_path):
    run(tmp_path / "job", "--from", invoices(tmp_path), "--answer", "total, date")
    job = read_job(tmp_path / "job")
    assert job.data.answer == ["total", "date"]
    prompt = (tmp_path / "job" / "prompt.md").read_text()
    assert "with the keys total, date." in prompt
    assert "text: {text}\nvendor: {vendor}" in prompt
    assert "{total}" not in prompt


def test_few_distinct_answers_make_a_label_job(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"hello {n}", "label": ["a{b", 'c"d'][n % 2]} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    run(tmp_path / "job", "--from", path)
    job = read_job(tmp_path / "job")
    assert job.rewards[0].use == "label"
    assert job.rewards[0].arguments == {"labels": ["a{b", 'c"d']}
    task = read_tasks(job, job.data.train)[1]
    assert task.answer == 'c"d'
    assert task.messages[0]["content"] == (
        'Classify the text. Answer with exactly one of these labels: a{b, c"d.\n\nhello 1'
    )
    assert not (tmp_path / "job" / "schema.json").exists()


def test_rows_in_rlposts_own_form_need_no_template(tmp_path):
    path = tmp_path / "rows.jsonl"
    calls = {"calls": [{"name": "f", "arguments": {"x": [1]}}]}
    row = {"prompt": "call f", "answer": calls, "tools": [{"function": {"name": "f"}}]}
    path.write_text("\n".join([json.dumps(row)] * 60))
    run(tmp_path / "job", "--from", path)
    job = read_job(tmp_path / "job")
    assert job.rewards[0].use == "tool_call"
    assert (job.data.prompt, job.data.answer) == (None, None)
    assert read_tasks(job, job.data.train)[0].answer == calls


def test_parquet_rows_and_a_model_folder_are_named_relative_to_the_job(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"question": ["1+1"] * 50, "answer": ["so #### 2"] * 50})
    parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "model").mkdir()
    run(tmp_path / "job", "--from", tmp_path / "rows.parquet", "--model", tmp_path / "model")
    job = read_job(tmp_path / "job")
    assert job.rewards[0].use == "math"
    assert job.model.path == "../model"
    assert r"\boxed{}" in read_tasks(job, job.data.train)[0].messages[0]["content"]


def test_a_reward_of_ones_own_is_written_beside_the_job_that_uses_it(tmp_path):
    run(tmp_path / "job", "--from", invoices(tmp_path), "--reward", "invoice_fields")
    job = read_job(tmp_path / "job")
    assert job.rewards[0].use == "invoice_fields:invoice_fields"
    assert (tmp_path / "job" / "test_invoice_fields.py").exists()


def test_a_small_file_gets_smaller_updates(tmp_path):
    run(tmp_path / "job", "--from", invoices(tmp_path, rows=12))
    assert read_job(tmp_path / "job").rollout.tasks_per_update == 5


def test_real_receipts_get_a_job_that_reads_them(tmp_path):
    path = DATA / "sroie" / "train.jsonl"
    if not path.exists():
        pytest.skip("the receipts of RLPOST_DATA are not here")
    run(tmp_path / "job", "--from", path, "--answer", "company,date,address,total")
    job = read_job(tmp_path / "job")
    assert job.rewards[0].arguments == {
        "fields": {"company": "text", "date": "date", "address": "text", "total": "amount"},
        "day_first": True,
    }
    assert job.data.split_by == "company"
    assert len(read_tasks(job, job.data.train)) == 432


@pytest.mark.parametrize(
    ("answer", "words"), [("totl", "did you mean total?"), ("zzz", "the columns are id, text")]
)
def test_an_answer_column_that_is_not_there_is_named_with_a_cure(tmp_path, answer, words):
    assert words in refusal(tmp_path / "job", "--from", invoices(tmp_path), "--answer", answer)
    assert not (tmp_path / "job").exists()


def test_rows_without_anything_like_a_gold_ask_for_it(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "hello"}\n')
    assert "name them with --answer" in refusal(tmp_path / "job", "--from", tmp_path / "rows.jsonl")


def test_files_that_are_there_are_never_overwritten(tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "prompt.md").write_text("mine")
    assert "prompt.md is there already" in refusal(tmp_path / "job", "--from", invoices(tmp_path))
    assert [p.name for p in (tmp_path / "job").iterdir()] == ["prompt.md"]
    assert (tmp_path / "job" / "prompt.md").read_text() == "mine"


# ── guesses ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "values", "type_"),
    [
        ("date", ["25/12/2018", "2018-12-25", "10 OCT 2017", "Oct 10, 2017", "1.2.19"], "date"),
        ("when", ["25/12/2018 8:13:39 PM", "19/10/2018 20:49:59"], "date"),
        ("x", ["9.00", "1,234.50", "RM 60.30", "12,50 €", "(5.00)"], "amount"),
        ("total", ["9", "12", "1,000"], "amount"),
        ("total", [9.5, 12], "amount"),
        ("pages", ["1", "2", "30"], "number"),
        ("pages", [1, 2], "number"),
        ("phone", ["07-3507405", "03-11122233"], "text"),
        ("invoice_no", ["TD01167104", "A-12"], "id"),
        ("account_id", ["12", "13"], "id"),
        ("ok", [True, False], "boolean"),
        ("currency", ["EUR", "USD", "EUR"], "currency"),
        ("kind", ["a", "b"] * 5, "enum"),
        ("kind", ["a", "b", "c"], "text"),
        ("items", [["a"], []], "list"),
        ("seller", [{"name": "a"}], "object"),
        ("nothing", [], "text"),
        ("year", ["2018 was a year", "x"], "text"),
    ],
)
def test_a_fields_type_is_guessed_from_its_values(name, values, type_):
    assert guess_field(name, values)["type"] == type_


def test_the_order_of_day_and_month_is_told_by_dates_that_read_one_way():
    assert day_comes_first(["03/04/2020", "25/12/2018"]) is True
    assert day_comes_first(["03/04/2020", "12/25/2018"]) is False
    assert day_comes_first(["03/04/2020", "2018-12-25"]) is None


@pytest.mark.parametrize(
    ("values", "reward"),
    [
        ([{"calls": []}], "tool_call"),
        ([{"total": 1}], "extraction"),
        ([["a", "b"]], "label"),
        (["spam", "ham"] * 5, "label"),
        (["so #### 72", "#### 1"], "math"),
        (["12", "1,024"], "math"),
        ([f"a long sentence, number {n}" for n in range(10)], "text"),
    ],
)
def test_a_reward_is_guessed_from_the_answers(values, reward):
    assert guess_reward(values) == reward


# ── a reward of one's own ──────────────────────────────────────────────────────────────────────


def test_a_written_reward_passes_its_own_test(tmp_path, capsys):
    assert run(tmp_path / "mine", "--reward", "invoice_fields") == 0
    said = capsys.readouterr().out
    assert 'use = "invoice_fields:invoice_fields"' in said
    tried = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path / "mine"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert tried.returncode == 0, tried.stdout
    assert "3 passed" in tried.stdout


def test_a_written_reward_is_added_beside_other_files(tmp_path):
    (tmp_path / "job.toml").write_text("")
    run(tmp_path, "--reward", "mine")
    assert (tmp_path / "mine.py").exists()
    assert "mine.py is there already" in refusal(tmp_path, "--reward", "mine")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("json", "is the name of a Python module"),
        ("label", "is built in"),
        ("my-reward", "is not a Python name"),
        ("class", "is not a Python name"),
        ("../up", "is not a Python name"),
    ],
)
def test_a_name_that_cannot_be_a_module_is_refused(tmp_path, name, words):
    assert words in refusal(tmp_path / "x", "--reward", name)
    assert not (tmp_path / "x").exists()


# ── the demo ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def template(tmp_path, monkeypatch):
    folder = tmp_path / "template"
    (folder / "model").mkdir(parents=True)
    for name in ("job.toml", "prompt.md", "model/config.json"):
        (folder / name).write_text(name)
    monkeypatch.setattr(init, "TEMPLATE", folder)
    return folder


def test_the_demo_is_copied_into_a_new_folder(tmp_path, template, capsys):
    assert run(tmp_path / "demo") == 0
    copied = {str(p.relative_to(tmp_path / "demo")) for p in (tmp_path / "demo").rglob("*")}
    assert copied == {"job.toml", "prompt.md", "model", "model/config.json"}
    assert f"next: rlpost run {tmp_path / 'demo'}/job.toml" in capsys.readouterr().out


def test_the_demo_refuses_a_folder_with_files_and_a_file(tmp_path, template):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert "is not empty" in refusal(tmp_path / "full")
    assert "is a file" in refusal(tmp_path / "full" / "x")
    assert "cannot be made" in refusal(tmp_path / "full" / "x" / "y")


def test_an_installation_without_the_demo_says_what_to_do(tmp_path, template):
    (template / "job.toml").unlink()
    assert "this installation has no demo: job.toml" in refusal(tmp_path / "demo")


def test_answer_columns_without_rows_are_refused(tmp_path):
    assert "add --from FILE" in refusal(tmp_path / "x", "--answer", "a")


def test_the_built_in_names_are_those_that_are_installed():
    project = Path(__file__).parents[2] / "pyproject.toml"
    points = tomllib.loads(project.read_text())["project"]["entry-points"]["rlpost.rewards"]
    assert set(init.BUILT_IN) == set(points)


def test_init_needs_neither_torch_nor_ray():
    code = (
        "import sys, rlpost.cli.init;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'vllm', 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
