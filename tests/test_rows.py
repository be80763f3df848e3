import json
import os
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlpost.errors import RowError, UserError, UserErrors
from rlpost.rows import infer_schema, read_rows, split
from rlpost.types import Task

DATA = Path(os.environ.get("RLPOST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def write(folder, text, name="rows.jsonl"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def complaints(path, **options):
    """The lines of what reading `path` raises."""
    with pytest.raises(UserError) as caught:
        read_rows(path, **options)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


# ── what a row becomes ─────────────────────────────────────────────────────────────────────────


def test_a_prompt_becomes_one_user_message_and_the_line_number_its_id(tmp_path):
    path = write(tmp_path, '\n{"prompt": "2+2?", "answer": "4", "level": 1}\n')
    [task] = read_rows(path)
    assert task == Task(
        id="2",
        messages=[{"role": "user", "content": "2+2?"}],
        answer="4",
        images=[],
        meta={"level": 1},
    )


def test_every_own_column_reaches_its_field(tmp_path):
    row = {
        "id": 7,
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "answer": {"calls": []},
        "schema": {"type": "object"},
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "images": ["a.png"],
        "vendor": "A",
    }
    [task] = read_rows(write(tmp_path, json.dumps(row)))
    assert (task.id, task.messages, task.answer) == ("7", row["messages"], row["answer"])
    assert (task.schema, task.tools, task.images) == (row["schema"], row["tools"], row["images"])
    assert task.meta == {"vendor": "A"}


def test_a_template_fills_columns_and_keeps_doubled_braces(tmp_path):
    path = write(tmp_path, '{"text": "TEA {1}", "n": 3, "none": null, "o": {"é": 1}}')
    [task] = read_rows(path, prompt='{{"a": {n}}} {text}|{none}|{ o }\n')
    assert task.messages[0]["content"] == '{"a": 3} TEA {1}||{"é": 1}'


def test_a_list_of_answer_columns_becomes_an_object_with_an_inferred_schema(tmp_path):
    path = write(tmp_path, "text,total,date\nx,1.00,2020\ny,2.00,\n", "rows.csv")
    tasks = read_rows(path, prompt="{text}", answer=["total", "date"])
    assert [task.answer for task in tasks] == [
        {"total": "1.00", "date": "2020"},
        {"total": "2.00", "date": None},
    ]
    assert tasks[0].schema == {
        "type": "object",
        "properties": {"total": {"type": "string"}, "date": {"type": ["null", "string"]}},
        "required": ["total", "date"],
        "additionalProperties": False,
    }


def test_the_schema_of_the_row_comes_before_that_of_the_job(tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "array"}')
    path = write(tmp_path, '{"prompt": "a", "schema": {"type": "string"}}\n{"prompt": "b"}')
    tasks = read_rows(path, schema=tmp_path / "schema.json")
    assert [task.schema for task in tasks] == [{"type": "string"}, {"type": "array"}]


def test_one_answer_column_is_the_gold_itself(tmp_path):
    tasks = read_rows(
        write(tmp_path, "text;label\nhi;greet\n", "rows.csv"), prompt="{text}", answer="label"
    )
    assert tasks[0].answer == "greet"
    assert tasks[0].meta == {"text": "hi"}


def test_csv_cells_may_hold_json_quotes_and_line_breaks(tmp_path):
    text = (
        'prompt,answer,tools\n"a\n""b""","{""calls"": []}","[{""function"": {""name"": ""f""}}]"\n'
    )
    [task] = read_rows(write(tmp_path, b"\xef\xbb\xbf" + text.encode(), "rows.csv"))
    assert task.messages[0]["content"] == 'a\n"b"'
    assert task.answer == {"calls": []}
    assert task.tools == [{"function": {"name": "f"}}]


def test_a_csv_cell_may_be_longer_than_the_csv_module_allows_by_default(tmp_path):
    long = "x" * 200_000
    [task] = read_rows(write(tmp_path, f"prompt,answer\n{long},1\n", "rows.csv"))
    assert task.messages[0]["content"] == long


def test_parquet_values_become_plain_json(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table(
        {
            "messages": [[{"role": "user", "content": "q", "name": None}]],
            "total": [Decimal("9.00")],
            "day": [date(2020, 1, 2)],
        }
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    [task] = read_rows(tmp_path / "rows.parquet", answer=["total", "day"])
    assert task.messages == [{"role": "user", "content": "q"}]
    assert task.answer == {"total": "9.00", "day": "2020-01-02"}
    assert task.id == "1"


def test_a_line_separator_inside_a_string_does_not_end_the_row(tmp_path):
    tasks = read_rows(
        write(tmp_path, '{"prompt": "a\u2028b\x0c"}\r\n{"prompt": "c"}\r\n'.replace("\x0c", "\\f"))
    )
    assert [task.messages[0]["content"] for task in tasks] == ["a\u2028b\f", "c"]


# ── mistakes ───────────────────────────────────────────────────────────────────────────────────


def test_all_mistakes_of_a_file_are_reported_at_once(tmp_path):
    text = (
        b'{"prompt": "a"\n[1]\n{"prompt": "b", "tools": 1}\n\xff\n'
        b'{"prompt": NaN}\n{"prompt": "c", "id": 1, "id": 2}\n'
    )
    lines = complaints(write(tmp_path, text))
    found = "\n".join(lines)
    assert "malformed JSON: Expecting ',' delimiter at column 15" in found
    for number in range(1, 7):
        assert f"rows.jsonl, line {number})" in found
    assert "column 'tools' is a JSON integer" in found
    assert "a JSON array, not an object" in found
    assert "0xff at byte 1 of the line" in found
    assert "NaN is not JSON" in found
    assert "'id' occurs twice" in found


def test_a_missing_column_is_named_with_line_and_the_nearest_column(tmp_path):
    path = write(tmp_path, '{"text": "a", "total": 1}\n{"text": "b", "totl": 1}\n')
    [line] = complaints(path, prompt="{text}", answer=["total"])
    assert line == f"the row has no column 'total' ({path}, line 2); did you mean totl?"


def test_an_unknown_column_of_the_template_is_one_complaint_for_the_whole_file(tmp_path):
    path = write(tmp_path, '{"text": "a", "n": 1}\n' * 50)
    [line] = complaints(path, prompt="{txet}", prompt_place="prompt.md")
    assert "prompt.md uses the column 'txet', which no row has" in line
    assert "did you mean text?" in line
    assert "the columns are text, n" in line


def test_a_lone_brace_in_the_template_is_named_with_its_line(tmp_path):
    path = write(tmp_path, '{"text": "a"}')
    [line] = complaints(path, prompt='Say\n{\n"a": 1}', prompt_place="prompt.md")
    assert "(prompt.md, line 2)" in line
    assert "{{ and }} are literal braces" in line


def test_rows_without_a_prompt_are_told_of_the_template(tmp_path):
    [line] = complaints(write(tmp_path, '{"text": "a"}\n' * 3))
    assert "name a template with [data] prompt; the columns are text" in line


def test_duplicate_ids_name_both_rows(tmp_path):
    path = write(
        tmp_path, '{"prompt": "a", "id": "x"}\n{"prompt": "b"}\n{"prompt": "c", "id": "x"}'
    )
    [line] = complaints(path)
    assert "'x' is already that of row 1" in line
    assert "line 3" in line


def test_the_same_mistake_on_many_lines_is_counted_after_five(tmp_path):
    text = '{"prompt": "a"}\n' + '{"q": "b"}\n' * 500
    lines = complaints(write(tmp_path, text))
    assert len(lines) == 6
    assert lines[-1].startswith("495 more mistakes")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_an_empty_file_has_no_rows(tmp_path, name):
    assert "the file has no rows" in complaints(write(tmp_path, "", name))[0]


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path, "", "train.jsonl")
    assert "did you mean train.jsonl?" in complaints(tmp_path / "trian.jsonl")[0]


def test_an_unknown_suffix_is_refused(tmp_path):
    assert "rows cannot be read from .xlsx" in complaints(write(tmp_path, "x", "rows.xlsx"))[0]


def test_a_csv_row_of_another_length_names_its_first_line(tmp_path):
    path = write(tmp_path, 'a,b\n"x\ny",1\n1,2,3\n', "rows.csv")
    [line] = complaints(path, prompt="{a}")
    assert "the row has 3 cells, the header 2" in line
    assert "line 4" in line


def test_an_open_quote_and_a_doubled_header_are_complaints(tmp_path):
    assert "malformed CSV" in complaints(write(tmp_path, 'prompt,b\n"x,1\n', "open.csv"))[0]
    assert (
        "names the column 'prompt' 2 times"
        in complaints(write(tmp_path, "prompt,prompt\nx,1\n", "twice.csv"))[0]
    )


def test_bytes_that_are_not_utf8_are_named_in_csv_too(tmp_path):
    [line] = complaints(write(tmp_path, b"prompt,b\nx,1\nCaf\xe9,2\n", "rows.csv"))
    assert "0xe9 at byte 4 of the line" in line
    assert "line 3" in line


def test_nan_in_parquet_is_named_with_its_row(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.table({"prompt": ["a", "b"], "x": [1.0, float("nan")]}), path)
    [line] = complaints(path)
    assert "column 'x' holds nan" in line
    assert "rows.parquet, row 2" in line
    path.write_bytes(b"PAR1 not really")
    assert "not a readable Parquet file" in complaints(path)[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": ""}, "column 'prompt' is empty"),
        ({"prompt": 3}, "column 'prompt' is a JSON integer"),
        ({"messages": []}, "column 'messages' is empty"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "has the role 'robot'"),
        ({"messages": [{"role": "user"}]}, "message 1 of 'messages' has no content"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "ends with the assistant's own message",
        ),
        ({"prompt": "x", "tools": [{"name": "f"}]}, "tool 1 of 'tools' is not in OpenAI's form"),
        ({"prompt": "x", "schema": 1}, "column 'schema' is a JSON integer"),
        ({"prompt": "x", "images": [1]}, "column 'images' is not a list of paths"),
        ({"prompt": "x", "id": 1.5}, "column 'id' is a JSON number"),
        ({"prompt": "x", "weight": 1e999}, "Infinity"),
    ],
)
def test_a_malformed_cell_is_named(tmp_path, row, words):
    [line] = complaints(write(tmp_path, json.dumps(row)))
    assert words in line
    assert "line 1" in line


def test_numbers_beyond_range_and_deep_nesting_do_not_crash_the_reader(tmp_path):
    text = '{"prompt": "a", "x": 1e999}\n{"prompt": ' + "9" * 5000 + '}\n{"prompt": '
    text += "[" * 100_000 + "}\n"
    lines = complaints(write(tmp_path, text))
    assert len(lines) == 3
    assert "nested too deeply" in lines[2]


def test_a_lone_surrogate_is_a_complaint_and_a_pair_is_text(tmp_path):
    assert "without its partner" in complaints(write(tmp_path, r'{"prompt": "\ud83d"}'))[0]
    assert (
        read_rows(write(tmp_path, r'{"prompt": "\ud83d\ude00"}'))[0].messages[0]["content"] == "😀"
    )


def test_an_empty_answer_cell_is_a_complaint(tmp_path):
    path = write(tmp_path, "text,label\na,x\nb,\n", "rows.csv")
    [line] = complaints(path, prompt="{text}", answer="label")
    assert "column 'label' is empty" in line
    assert "line 3" in line


def test_split_by_demands_its_column(tmp_path):
    [line] = complaints(write(tmp_path, '{"prompt": "a", "company": 1}'), split_by="vendor")
    assert "[data] split_by names the column 'vendor'" in line


# ── schema and split ───────────────────────────────────────────────────────────────────────────

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-1, 1) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, max_size=3)
    ),
    max_leaves=8,
)


unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@unhurried
@given(st.lists(st.dictionaries(st.sampled_from(["x", "y"]), json_values), min_size=1, max_size=5))
def test_every_answer_satisfies_the_schema_inferred_from_it(answers):
    jsonschema = pytest.importorskip("jsonschema")
    tasks = [Task(id=str(i), messages=[], answer=answer) for i, answer in enumerate(answers)]
    schema = infer_schema(tasks)
    for answer in answers:
        jsonschema.Draft202012Validator(schema).validate(answer)


def tasks_of(vendors):
    return [
        Task(id=str(i), messages=[], answer={"company": vendor}) for i, vendor in enumerate(vendors)
    ]


@unhurried
@given(
    st.lists(st.sampled_from("abcdefg"), min_size=2, max_size=60).filter(lambda v: len(set(v)) > 1),
    st.floats(0.05, 0.9),
    st.integers(0, 99),
)
def test_a_vendor_is_never_on_both_sides_and_no_side_is_empty(vendors, fraction, seed):
    tasks = tasks_of(vendors)
    train, validation = split(tasks, fraction, seed=seed, split_by="company")
    assert train and validation
    sides = [{task.answer["company"] for task in side} for side in (train, validation)]
    assert not sides[0] & sides[1]
    assert sorted(train + validation, key=lambda t: int(t.id)) == tasks
    assert [int(t.id) for t in train] == sorted(int(t.id) for t in train)


def test_spellings_of_one_vendor_are_one_cluster_and_rows_without_one_are_apart():
    tasks = tasks_of(["Tea & Co.", "TEA CO", "tea  co", None, None])
    for seed in range(20):
        _, validation = split(tasks, 0.4, seed=seed, split_by="company")
        ids = {task.id for task in validation}
        assert ids & {"0", "1", "2"} in (set(), {"0", "1", "2"})


def test_the_split_depends_on_seed_and_ids_alone():
    tasks = tasks_of(["x"] * 100)
    first = split(tasks, 0.15, seed=1)
    assert first == split(tasks, 0.15, seed=1)
    assert len(first[1]) == 15
    assert {t.id for t in split(tasks[::-1], 0.15, seed=1)[1]} == {t.id for t in first[1]}
    assert first[1] != split(tasks, 0.15, seed=2)[1]


@pytest.mark.parametrize(
    ("vendors", "split_by", "words"),
    [(["a"], None, "only one row"), (["a", "A"], "company", "the same company")],
)
def test_a_split_that_leaves_a_side_empty_is_an_error(vendors, split_by, words):
    with pytest.raises(RowError, match=words):
        split(tasks_of(vendors), 0.5, seed=0, split_by=split_by)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 2])
def test_a_share_outside_zero_and_one_is_refused(fraction):
    with pytest.raises(RowError, match="between 0 and 1"):
        split(tasks_of("ab"), fraction, seed=0)


def test_several_mistakes_are_one_error_with_a_list(tmp_path):
    with pytest.raises(UserErrors) as caught:
        read_rows(write(tmp_path, "1\n2\n"))
    assert len(caught.value.errors) == 2


# ── real rows ──────────────────────────────────────────────────────────────────────────────────


def test_real_receipts_become_tasks_and_no_company_is_on_both_sides():
    path = DATA / "sroie" / "train.jsonl"
    if not path.exists():
        pytest.skip("the receipts of RLPOST_DATA are not here")
    fields = ["company", "date", "address", "total"]
    tasks = read_rows(path, prompt="Receipt:\n{text}", answer=fields, split_by="company")
    assert len(tasks) == 432
    train, validation = split(tasks, 0.15, seed=1, split_by="company")
    assert abs(len(validation) - 65) <= 3
    assert not {t.answer["company"] for t in train} & {t.answer["company"] for t in validation}


def test_real_labels_and_sums_become_tasks():
    path = DATA / "clinc150" / "val.jsonl"
    if not path.exists():
        pytest.skip("the labels of RLPOST_DATA are not here")
    assert len(read_rows(path, prompt="{text}", answer="label")) == 3000
    tasks = read_rows(DATA / "gsm8k" / "test.jsonl", prompt="{question}", answer="answer")
    assert len(tasks) == 600 and all("####" in task.answer for task in tasks)
