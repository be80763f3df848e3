"""The judge reward against a real vLLM server on loopback. The model is the demo's tiny one: the
server keeps it to the marks' schema, so its answers are marks, whatever they are worth."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from rlpost_rewards.judge import judge

from rlpost.reward import recorded
from rlpost.types import Task

MODEL = Path(__file__).parents[2] / "rlpost" / "template" / "model"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed"),
    pytest.mark.skipif(
        not (MODEL / "config.json").exists(), reason="the demo's model is not there"
    ),
]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL)]
    command += ["--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4"]
    # a model this small would else fill the answer with white space
    command += [
        "--structured-outputs-config",
        '{"backend": "xgrammar", "disable_any_whitespace": true}',
    ]
    variables = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            start_new_session=True,  # its engine is a child: both go at the end
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(url, server, log, *, seconds=240):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"vLLM did not start: {log.read_text(errors='replace')[-1_500:]}")


async def test_a_vllm_server_gives_marks_on_the_scale(endpoint):
    task = Task(id="7", messages=({"role": "user", "content": "Say hello."},), answer="hello")
    rubric = {"warm": "The reply greets.", "short": "The reply is one word."}
    score = await judge(
        task, recorded(task, "hello"), endpoint=endpoint, model="judge", rubric=rubric, scale=[0, 5]
    )
    assert set(score.parts) == {"warm", "short"}
    assert all(part * 5 == int(part * 5) for part in score.parts.values())
    assert 0.0 <= score.value <= 1.0


async def test_a_model_that_is_not_served_is_the_jobs_mistake(endpoint):
    from rlpost.errors import JobError

    task = Task(id="7", messages=(), answer="hello")
    with pytest.raises(JobError, match="404"):
        await judge(
            task, recorded(task, "hello"), endpoint=endpoint, model="other", rubric="Is it?"
        )
