"""vLLM in processes of its own: tensor parallel, and the OpenAI server."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from asking import TESTBED, compare, expect
from checkpoints import save
from test_vllm_families import prompts
from test_vllm_testbed import MODEL, QUESTIONS, questions

import lp_patch.vllm

ROOT = TESTBED.parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from ask_server import ask

CODE = """
import pickle, sys
sys.path.insert(0, {here!r})
from asking import serve
if __name__ == "__main__":
    given = pickle.load(open({given!r}, "rb"))
    (answers,) = serve(**given, tensor_parallel_size=2, distributed_executor_backend="mp")
    pickle.dump(answers, open({answers!r}, "wb"))
"""


def in_parallel(tmp_path, **given):
    """What `serve` returns of one round, with tensor parallel 2: two processes, a core each."""
    script, asked, answers = (tmp_path / name for name in ("run.py", "given", "answers"))
    asked.write_bytes(pickle.dumps(given))
    script.write_text(CODE.format(here=str(Path(__file__).parent), given=str(asked), answers=str(answers)))
    two = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run([sys.executable, script], env={**os.environ, **two}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return pickle.loads(answers.read_bytes())


def test_tensor_parallel_heads(tmp_path):
    """A scorer reads attention, of which each process has some of the heads."""
    save("llava", tmp_path)
    options = {"tokens": 5, "scorer": "cls"}
    asked = {"rounds": [prompts("llava")], "new": 4, "stop": False, "max_model_len": 200}
    ours = in_parallel(tmp_path, folder=tmp_path, options=options, **asked)
    unequal, difference = compare(ours, expect(tmp_path, options, prompts("llava"), 4, stop=False))
    assert unequal == 0 and difference < 1e-4


@pytest.mark.parametrize("scorer", ["diversity", "cls"] if QUESTIONS > 40 else [])
def test_tensor_parallel(scorer, tmp_path):
    """The testbed's tower has three heads: each process has all of it."""
    options, asked = {"tokens": 64, "scorer": scorer}, questions(100)[0]
    engine = {"mm_encoder_tp_mode": "data", "max_model_len": 700}
    ours = in_parallel(tmp_path, folder=MODEL, options=options, rounds=[asked], new=3, **engine)
    unequal, difference = compare(ours, expect(MODEL, options, asked, 3))
    print(f"\ntensor parallel, {options}: of {len(asked)} {unequal} unequal, log-probabilities to {difference:.1e}")
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
