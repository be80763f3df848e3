"""Word problems with a number behind #### as GSM8K has them: rows like {"question": …, "answer":
…}."""

from rlpost.env import SingleTurn
from rlpost.row_files import Complaints, Row, read_table
from rlpost.types import Task
from rlpost_envs.prompts import read_prompt

PROMPT = """\
{question}

Think step by step, then write the final number alone on the last line after ####."""

MARK = "####"


class Gsm8k(SingleTurn):
    """The environment of a file of word problems.

    `answer` of a task is the final number as the row writes it (thousands commas included);
    `meta.solution` keeps the steps before it. `prompt` is a file with {question}. Raises RowError
    or UserErrors for rows, JobError for arguments.
    """

    def __init__(self, *, path: str, prompt: str | None = None):
        template = read_prompt(prompt, PROMPT, columns=("question",), needed="question")
        table, complaints = read_table(path), Complaints.of(path)
        golds = [_read(row, complaints) for row in table]
        complaints.settle()
        super().__init__(
            Task(
                id=str(row.columns.get("id", row.line)),
                messages=[{"role": "user", "content": template.render(row.columns)}],
                answer=final,
                meta={
                    **{k: v for k, v in row.columns.items() if k not in ("id", "answer")},
                    "solution": solution,
                },
            )
            for row, (solution, final) in zip(table, golds, strict=True)
        )


def _read(row: Row, complaints: Complaints) -> tuple[str, str]:
    """The steps and the final number of a row's answer."""
    question, answer = row.columns.get("question"), row.columns.get("answer")
    if not isinstance(question, str) or not question.strip():
        complaints.add("column 'question' holds no text", line=row.line)
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        complaints.add("column 'answer' holds no text", line=row.line)
        return "", ""
    solution, mark, final = answer.rpartition(MARK)
    if mark and not final.strip():
        complaints.add(f"nothing follows {MARK} in 'answer'", line=row.line)
    return solution.strip(), final.strip()
