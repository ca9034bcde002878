"""vLLM in processes of its own: tensor parallel, and the OpenAI server."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from asking import TESTBED, compare, expect
from test_vllm_testbed import QUESTIONS, questions

import lp_patch.vllm

ROOT = TESTBED.parents[1]
MODEL = TESTBED / "model"
sys.path.insert(0, str(ROOT / "examples"))
from ask_server import ask  # noqa: E402

CODE = """
import json, sys
sys.path.insert(0, {here!r})
from asking import serve
from test_vllm_testbed import MODEL, questions
if __name__ == "__main__":
    engine = {{"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "max_model_len": 700}}
    (answers,) = serve(MODEL, {options!r}, [questions({count})[0]], 3, **engine)
    json.dump(answers, open({path!r}, "w"))
"""


@pytest.mark.parametrize("scorer", ["diversity", "cls"] if QUESTIONS > 40 else ["cls"])
def test_tensor_parallel(scorer, tmp_path):
    """Two processes; what a scorer reads is attention, of which each has some of the heads."""
    count, options, path = min(QUESTIONS, 100), {"tokens": 64, "scorer": scorer}, tmp_path / "answers.json"
    script = tmp_path / "run.py"
    script.write_text(CODE.format(here=str(Path(__file__).parent), options=options, count=count, path=str(path)))
    two = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run([sys.executable, script], env={**os.environ, **two}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    unequal, difference = compare(json.loads(path.read_text()), expect(MODEL, options, questions(count)[0], 3))
    print(f"\ntensor parallel, {options}: {count} questions, {unequal} unequal, log-probabilities to {difference:.1e}")
    assert unequal == 0 and difference < 1e-4


def test_server(tmp_path):
    """Pictures as data URLs over HTTP, on loopback."""
    options = {"tokens": 64, "scorer": "learned"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--model", MODEL, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    overrides = json.dumps(lp_patch.vllm.overrides(MODEL, **options))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, "--max-model-len", "700"]
    log = tmp_path / "log"
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        server = subprocess.Popen([*command, "--hf-overrides", overrides], stdout=out, stderr=out, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        wait(server, url, log)
        asked = json.loads((TESTBED / "evaluation" / "questions.json").read_text())["questions"][: min(QUESTIONS, 40)]
        said = [ask(url, TESTBED / "evaluation" / "pictures" / x["picture"], x["question"], 3) for x in asked]
    finally:
        server.terminate()
        server.wait(60)
    prompts = [(f"<s>{text}", images) for text, images in questions(len(asked))[0]]
    words = [ids for ids, _ in expect(MODEL, options, prompts, 3)]
    from transformers import AutoTokenizer

    wanted = [x.strip() for x in AutoTokenizer.from_pretrained(MODEL).batch_decode(words, skip_special_tokens=True)]
    unequal = sum(a != b for (a, _), b in zip(said, wanted, strict=True))
    print(f"\nOpenAI server, {options}: {len(asked)} questions, {unequal} unequal, prompts of {said[0][1]} tokens")
    assert unequal == 0 and max(tokens for _, tokens in said) < 90


def wait(server, url, log):
    """Until it answers."""
    for _ in range(300):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urlopen(f"{url}/health"):
                return
        except (URLError, ConnectionError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])
