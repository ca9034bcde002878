"""Ask a server about a picture: ``python examples/ask_server.py [PICTURE] [QUESTION] [--url ...]``, after `make serve`.

Plain HTTP, as any client of an OpenAI server does it; nothing of lp_patch is needed on this side.
"""

import argparse
import base64
import json
import time
from pathlib import Path
from urllib.request import Request, urlopen

TESTBED = Path(__file__).resolve().parent / "testbed"


def ask(url: str, picture: Path, question: str, tokens: int = 64) -> tuple[str, int]:
    """The answer, and how many tokens the prompt had."""
    data = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)) as answer:
        said = json.load(answer)
    return said["choices"][0]["message"]["content"].strip(), said["usage"]["prompt_tokens"]


def main() -> None:
    """Ask the demo's questions, or the one given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", nargs="?", type=Path, default=TESTBED / "demo.png")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    args = parser.parse_args()
    asked = [x["question"] for x in json.loads((TESTBED / "demo.json").read_text())["questions"]]
    for question in [args.question] if args.question else asked:
        began = time.perf_counter()
        answer, tokens = ask(args.url, args.picture, question)
        print(f"{question} {answer}   ({tokens} tokens in the prompt, {1000 * (time.perf_counter() - began):.0f} ms)")


if __name__ == "__main__":
    main()
