"""LearnablePruner: its numbers, its files, where `apply` finds it, and a Hub-shaped server on loopback."""

import base64
import hashlib
import json
import pickle
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import WIDTH, tiny_llava
from transformers import LlavaForConditionalGeneration

import lp_patch.pruner
from lp_patch import LearnablePruner, PrunerError
from lp_patch.pruner import KNOWN_PRUNERS, resolve_pruner

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/pruner"
HUB_1 = hasattr(huggingface_hub, "close_session")
close_session = huggingface_hub.close_session if HUB_1 else huggingface_hub.utils.reset_sessions
FACTS = {
    "base_model": "llava-hf/llava-1.5-7b-hf",
    "model_type": "llava",
    "license": "cc-by-4.0",
    "training_info": {
        "objective": "next token and the mean of the mask",
        "data": "LLaVA-665K",
        "seed": 7,
        "figures": {"accuracy at 64 tokens": 96.9},
    },
}


@pytest.fixture
def pruner():
    torch.manual_seed(0)
    return LearnablePruner(6, 5)


@pytest.fixture
def folder(pruner, tmp_path):
    pruner.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# ---------------------------------------------------------------------- the module


def test_parameter_count_of_the_paper():
    counted = sum(p.numel() for p in LearnablePruner(1024).parameters())
    assert counted == 1024 * 512 + 512 + 512 * 2 + 2 == 525_826
    assert LearnablePruner(1024).intermediate_size == 512


def by_hand(pruner, x):
    """Keep probability of one vector, in float64: Linear, GELU through erf, Linear, softmax; index 1 keeps."""
    weight = {name: tensor.double() for name, tensor in pruner.state_dict().items()}
    hidden = weight["fc1.weight"] @ x.double() + weight["fc1.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    drop, keep = weight["fc2.weight"] @ hidden + weight["fc2.bias"]
    return 1 / (1 + torch.exp(drop - keep))


def test_score_is_the_keep_probability(pruner):
    x = 3 * torch.randn(2, 4, 6)
    got = pruner.score(x)
    assert got.shape == (2, 4)
    assert got.dtype == torch.float32
    assert 0 <= got.min() < got.max() <= 1
    expected = torch.stack([torch.stack([by_hand(pruner, token) for token in row]) for row in x])
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pruner(x).softmax(-1)[..., 1], got)


@pytest.mark.parametrize("features", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_score_takes_any_dtype_and_answers_in_float32(pruner, features, weights):
    pruner.to(weights)
    x = torch.randn(3, 6).to(features)
    got = pruner.score(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.stack([by_hand(pruner, token) for token in x]), rtol=0, atol=0.02)


def test_score_of_saturated_logits_stays_a_probability(pruner):
    with torch.no_grad():
        pruner.fc2.bias.copy_(torch.tensor([-1e4, 1e4]))
    assert pruner.score(torch.randn(4, 6)).tolist() == [1.0] * 4


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "6", True, None])
def test_sizes_are_checked(name, value):
    with pytest.raises(PrunerError, match=f"{name} must be an int >= 1, got {value!r}"):
        LearnablePruner(**{"hidden_size": 6, "intermediate_size": 5, name: value})


# ---------------------------------------------------------------------- the files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_bitwise(pruner, tmp_path, dtype):
    pruner.to(dtype).save_pretrained(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    loaded = LearnablePruner.from_pretrained(str(tmp_path / "new" / "folder"))
    assert (loaded.hidden_size, loaded.intermediate_size) == (6, 5)
    assert list(loaded.state_dict()) == list(pruner.state_dict())
    for name, tensor in pruner.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert loaded.state_dict()[name].equal(tensor)
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())


def test_files_are_plain(pruner, folder):
    assert json.loads((folder / "config.json").read_text()) == {
        "format_version": 1,
        "hidden_size": 6,
        "intermediate_size": 5,
        "base_model": None,
        "model_type": None,
        "license": "apache-2.0",
        "training_info": {},
    }
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()} == {
        "fc1.weight": (5, 6),
        "fc1.bias": (5,),
        "fc2.weight": (2, 5),
        "fc2.bias": (2,),
    }


def facts(pruner):
    return {name: getattr(pruner, name) for name in FACTS}


def test_facts_round_trip(tmp_path):
    LearnablePruner(6, 5, **FACTS).save_pretrained(tmp_path)
    assert facts(LearnablePruner.from_pretrained(tmp_path)) == FACTS
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in FACTS} == FACTS


def test_files_without_facts(pruner, folder):
    sizes = {"format_version": 1, "hidden_size": 6, "intermediate_size": 5}
    (folder / "config.json").write_text(json.dumps(sizes))
    loaded = LearnablePruner.from_pretrained(folder)
    assert facts(loaded) == {"base_model": None, "model_type": None, "license": None, "training_info": {}}
    assert loaded.fc1.weight.equal(pruner.fc1.weight)


WRONG_FACTS = [(name, value) for name in ("base_model", "model_type", "license") for value in ("", 3, ["llava"], {})]
WRONG_FACTS += [("training_info", value) for value in ("text", 3, ["data"], {"loss": float("nan")})]


@pytest.mark.parametrize(("name", "value"), WRONG_FACTS)
def test_facts_are_checked(pruner, folder, tmp_path, name, value):
    with pytest.raises(PrunerError, match=f"{name} must be "):
        LearnablePruner(6, 5, **{name: value})
    setattr(pruner, name, value)
    with pytest.raises(PrunerError, match=f"{name} must be "):
        pruner.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    rewrite(folder, **{name: value})
    refused(folder, f"{name} must be ")


def test_facts_that_json_does_not_hold(pruner, tmp_path):
    pruner.training_info["loss"] = torch.zeros(1)
    with pytest.raises(PrunerError, match=r"training_info must be a dict of what JSON holds \(.*Tensor"):
        pruner.save_pretrained(tmp_path / "new")


# ---------------------------------------------------------------------- the model card


def read_card(folder):
    """The card as the Hub's own client reads it, and its lines."""
    text = (folder / "README.md").read_text()
    return ModelCard(text).data.to_dict(), text.splitlines()


def test_card_states_what_is_known(tmp_path):
    LearnablePruner(6, 5, **FACTS).save_pretrained(tmp_path)
    data, lines = read_card(tmp_path)
    assert data == {
        "library_name": "lp_patch",
        "license": "cc-by-4.0",
        "base_model": "llava-hf/llava-1.5-7b-hf",
        "tags": ["lp_patch", "visual-token-pruning"],
    }
    assert [line for line in lines if line.startswith("| ") and line != "| | |"] == [
        "| base model | llava-hf/llava-1.5-7b-hf |",
        "| model type | llava |",
        "| license | cc-by-4.0 |",
        "| objective | next token and the mean of the mask |",
        "| data | LLaVA-665K |",
        "| samples | unknown |",
        "| seed | 7 |",
        "| accuracy at 64 tokens | 96.9 |",
    ]


def test_card_says_what_is_unknown(pruner, tmp_path):
    pruner.license = None
    pruner.training_info = {"figures": {}}
    pruner.save_pretrained(tmp_path)
    data, lines = read_card(tmp_path)
    assert data == {"library_name": "lp_patch", "tags": ["lp_patch", "visual-token-pruning"]}
    names = ("base model", "model type", "license", "objective", "data", "samples", "seed")
    assert [line for line in lines if line.endswith("unknown |") or line == "unknown"] == [
        *(f"| {name} | unknown |" for name in names),
        "unknown",
    ]


@pytest.mark.parametrize(
    "base", ["/models/llava", "./llava", "examples/testbed/model", "llava", "a b/c", "x/y\nlicense: z"]
)
def test_card_links_no_base_that_the_hub_would_refuse(pruner, tmp_path, base):
    pruner.base_model = base
    pruner.save_pretrained(tmp_path)
    data, lines = read_card(tmp_path)
    assert "base_model" not in data and data["license"] == "apache-2.0"
    assert f"| base model | {' '.join(base.split())} |" in lines


def test_card_keeps_its_tables_whole(pruner, tmp_path):
    pruner.training_info = {"data": "a | b\nc", "samples": [1, 2], "figures": {"x | y": {"z": None}}}
    pruner.save_pretrained(tmp_path)
    lines = read_card(tmp_path)[1]
    assert {r"| data | a \| b c |", "| samples | [1, 2] |", r'| x \| y | {"z": null} |'} <= set(lines)


def test_card_shows_how_to_apply(tmp_path):
    folder = tmp_path / 'with "quotes"'
    pruner = LearnablePruner(WIDTH, 5)
    pruner.save_pretrained(folder)
    text = (folder / "README.md").read_text()
    names = {"model": tiny_llava()}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["patch"]._settings.pruner.fc1.weight.equal(pruner.fc1.weight)


def test_card_is_replaced_only_while_it_is_ours(pruner, folder):
    card = folder / "README.md"
    ours = card.read_text()
    pruner.base_model = "org/model"
    pruner.save_pretrained(folder)
    assert "| base model | org/model |" in card.read_text() != ours
    for mine in ("# My own words", "\n".join(line for line in ours.splitlines() if "<!--" not in line)):
        card.write_text(mine)
        pruner.save_pretrained(folder)
        assert card.read_text() == mine


# ---------------------------------------------------------------------- damaged and hostile files


def refused(folder, match):
    with pytest.raises(PrunerError, match=match) as error:
        LearnablePruner.from_pretrained(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, f"no {name} in the folder .*a pruner is config.json and model.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"x"',
        "{}",
        "[" * 100_000,
        '{"format_version": 1, "hidden_size": 6}',
        '{"intermediate_size": 5}',
    ],
)
def test_config_of_something_else(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json of .* is not a pruner's")


def test_config_that_is_no_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00\x80")
    refused(folder, "config.json of .* is not a pruner's")


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format(folder, version):
    rewrite(folder, format_version=version)
    refused(folder, f"format_version {version!r}; this lp_patch reads 1")


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size"])
@pytest.mark.parametrize("value", [-6, 0, 6.0, "6", True, None, [6]])
def test_sizes_in_the_config_are_checked(folder, name, value):
    rewrite(folder, **{name: value})
    refused(folder, f"{name} must be an int >= 1")


@pytest.mark.parametrize("size", [10**18, 10**30])
def test_sizes_that_no_tensor_has(folder, size):
    rewrite(folder, hidden_size=size)
    refused(folder, "config.json of ")


@pytest.mark.parametrize("size", [7, 10**6])
def test_config_and_weights_of_different_sizes(folder, size):
    rewrite(folder, hidden_size=size)
    refused(folder, "model.safetensors of .* but config.json asks for")


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for end in (0, 4, 40, len(whole) - 1):
        path.write_bytes(whole[:end])
        refused(folder, "model.safetensors of .* cannot be read")


@pytest.mark.parametrize(
    "change",
    [
        lambda w: {**w, "extra": torch.zeros(1)},
        lambda w: {name: tensor for name, tensor in w.items() if name != "fc2.bias"},
        lambda w: {**w, "fc1.weight": w["fc1.weight"].T.contiguous()},
        lambda w: {f"model.{name}": tensor for name, tensor in w.items()},
        lambda w: {},
    ],
)
def test_other_tensors(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)
    refused(folder, "model.safetensors of .* but config.json asks for")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_weights_that_are_no_floats(folder, dtype):
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "fc2.bias": weights["fc2.bias"].to(dtype)}, path)
    refused(folder, "must hold finite floating-point numbers")


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_never_executed(folder, tmp_path):
    trace = tmp_path / "executed"
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(trace)))
    refused(folder, "cannot be read")
    torch.save(Bomb(trace), folder / "model.safetensors")
    refused(folder, "cannot be read")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(trace)))  # nor looked for under its usual name
    refused(folder, "no model.safetensors")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace))).close()  # the bomb itself works
    assert trace.exists()


def test_resolve(pruner, folder):
    assert resolve_pruner(None, 6) is None
    assert resolve_pruner(pruner, 6) is pruner
    for source in (folder, str(folder)):
        assert resolve_pruner(source, 6).state_dict()["fc1.weight"].equal(pruner.fc1.weight)
    for source in (pruner, folder):
        with pytest.raises(PrunerError, match="the pruner reads 6-wide features, this model has 24-wide ones"):
            resolve_pruner(source, 24)
    for wrong in (3, torch.nn.Linear(6, 2), LearnablePruner):
        with pytest.raises(PrunerError, match="must be a LearnablePruner, a folder or a Hub id, got "):
            resolve_pruner(wrong, 6)


# ---------------------------------------------------------------------- the model's own pruner, and another's


BASE = "llava-hf/llava-1.5-7b-hf"
SNAPSHOT = "/cache/models--llava-hf--llava-1.5-7b-hf/snapshots/0123abc"


@pytest.mark.parametrize(
    ("base", "model_type", "name"),
    [
        (None, None, "org/another"),
        (BASE, "llava", BASE),
        (BASE, None, "/models/llava-1.5-7b-hf"),
        (BASE, None, "models/llava-1.5-7b-hf/"),
        (BASE, None, SNAPSHOT),
        (BASE, "llava", ""),
        ("/trained/on/my-llava", None, "/copied/to/my-llava"),
    ],
)
def test_a_pruner_of_this_base_warns_of_nothing(base, model_type, name):
    model = tiny_llava()
    model.config._name_or_path = name
    lp_patch.apply(model, pruner=LearnablePruner(WIDTH, 5, base_model=base, model_type=model_type))


@pytest.mark.parametrize(
    ("base", "model_type", "name"),
    [
        (BASE, "llava", "llava-hf/llava-1.5-13b-hf"),
        (BASE, None, "/models/7b"),
        (BASE, None, SNAPSHOT.replace("7b", "13b")),
        (BASE, "llava_next", BASE),
        (None, "llava_next", ""),
    ],
)
def test_a_pruner_of_another_base_warns_once(base, model_type, name):
    model = tiny_llava()
    model.config._name_or_path = name
    with pytest.warns(UserWarning) as caught:
        lp_patch.apply(model, pruner=LearnablePruner(WIDTH, 5, base_model=base, model_type=model_type))
    assert len(caught) == 1 and caught[0].filename == __file__
    assert str(caught[0].message) == (
        f"the pruner was trained on {base!r} (model type {model_type!r}), this model is {name!r} ('llava'): "
        "how well it chooses tokens here is unknown"
    )


def test_this_folder_has_another_name(tmp_path, monkeypatch):
    (tmp_path / "llava-1.5-7b-hf").mkdir()
    monkeypatch.chdir(tmp_path / "llava-1.5-7b-hf")
    model = tiny_llava()
    model.config._name_or_path = "."
    lp_patch.apply(model, pruner=LearnablePruner(WIDTH, 5, base_model=BASE))


@pytest.fixture
def checkpoint(tmp_path):
    """A local checkpoint that carries its pruner, which says that it was trained on a checkpoint of another name."""
    tiny_llava(dtype=torch.float32).save_pretrained(tmp_path / "checkpoint")
    LearnablePruner(WIDTH, 5, **FACTS).save_pretrained(tmp_path / "checkpoint" / "lp_patch_pruner")
    return tmp_path / "checkpoint"


@pytest.fixture
def checkpoint_model(checkpoint):
    return LlavaForConditionalGeneration.from_pretrained(checkpoint)


def stage1(patch):
    """The scorer that a patch runs, and its pruner."""
    return patch._settings.scorer.name, patch._settings.pruner


def test_a_checkpoint_brings_its_pruner(checkpoint, checkpoint_model):
    inside = LearnablePruner.from_pretrained(checkpoint / "lp_patch_pruner")
    patch = lp_patch.apply(checkpoint_model)
    name, pruner = stage1(patch)
    assert name == "learned" and pruner.fc1.weight.equal(inside.fc1.weight)
    assert "'learned' before the LLM" in repr(patch)


@pytest.mark.parametrize("scorer", ["diversity", "cls", "random", "uniform"])
def test_a_scorer_by_name_looks_for_no_pruner(checkpoint_model, scorer):
    assert stage1(lp_patch.apply(checkpoint_model, scorer=scorer)) == (scorer, None)


@pytest.mark.parametrize("scorer", ["learned", "covering"])
def test_a_scorer_that_reads_a_pruner_finds_the_checkpoints(checkpoint, checkpoint_model, scorer):
    inside = LearnablePruner.from_pretrained(checkpoint / "lp_patch_pruner")
    name, pruner = stage1(lp_patch.apply(checkpoint_model, scorer=scorer))
    assert name == scorer and pruner.fc1.weight.equal(inside.fc1.weight)


def test_a_given_pruner_wins(checkpoint_model):
    given = LearnablePruner(WIDTH, 5)
    assert stage1(lp_patch.apply(checkpoint_model, pruner=given)) == ("learned", given)


@pytest.mark.filterwarnings("ignore:the pruner was trained on")  # given as a folder, it is compared again
def test_saved_settings_say_whether_there_is_a_pruner(checkpoint_model, tmp_path):
    lp_patch.apply(checkpoint_model).save_pretrained(tmp_path / "with")
    other = lp_patch.apply(tiny_llava())
    other.save_pretrained(tmp_path / "without")
    assert stage1(lp_patch.apply(checkpoint_model, tmp_path / "with"))[0] == "learned"
    assert stage1(lp_patch.apply(checkpoint_model, tmp_path / "without")) == ("diversity", None)


def test_a_model_without_a_name_has_no_pruner(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    assert stage1(lp_patch.apply(tiny_llava())) == ("diversity", None)


def test_a_checkpoint_with_a_wrong_pruner(checkpoint, checkpoint_model):
    rewrite(checkpoint / "lp_patch_pruner", hidden_size=WIDTH + 1)
    with pytest.raises(PrunerError, match=r'the pruner of .* \(scorer="diversity" prunes without it\): .* 25-wide'):
        lp_patch.apply(checkpoint_model)
    assert not lp_patch.is_applied(checkpoint_model)
    lp_patch.apply(checkpoint_model, scorer="diversity")


# ---------------------------------------------------------------------- the Hub


class Hub(ThreadingHTTPServer):
    """What huggingface_hub's client asks for when it downloads and uploads files, and a log of what it asked."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {p.name: p.read_bytes() for p in folder.iterdir()}
        self.commit = COMMIT
        self.revisions = {"main", "v1.0", COMMIT}
        self.asked = []
        self.missing_bytes = 0  # cut from each answer, though announced
        self.cut_after = []  # bytes after which the next answers with weights break off
        self.knows_ranges = True
        self.ranges = []  # asked for
        self.posted = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        body = self.answer()
        end = len(body) - self.server.missing_bytes
        if self.path.endswith("model.safetensors") and self.server.cut_after:
            end = self.server.cut_after.pop(0)
        self.wfile.write(body[:end])

    def answer(self):
        self.server.asked.append((self.command, self.path))
        repo, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        error = None
        if repo != REPO:
            error = "RepoNotFound"
        elif revision not in self.server.revisions:
            error = "RevisionNotFound"
        elif name not in self.server.files:
            error = "EntryNotFound"
        body = whole = b"" if error else self.server.files[name]
        start = 0
        if "Range" in self.headers:
            self.server.ranges.append(self.headers["Range"])
            if self.server.knows_ranges:
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                body = whole[start:]
        self.send_response(404 if error else 206 if start else 200)
        if error:
            self.send_header("X-Error-Code", error)
        else:
            self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def do_POST(self):
        """The four calls of an upload; the content of small files travels in the last one."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.loads(line) for line in content.splitlines()]
        self.server.posted[self.path] = lines
        answer = {}
        if self.path == "/api/repos/create":
            answer = {"url": f"{self.server.url}/{REPO}"}
        elif self.path == f"/api/models/{REPO}/preupload/main":
            answer["files"] = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in lines[0]["files"]
            ]
        elif self.path == f"/api/models/{REPO}/commit/main":
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.files = {file["path"]: base64.b64decode(file["content"]) for file in files}
            answer = {"commitUrl": f"https://huggingface.co/{REPO}/commit/{COMMIT}", "commitOid": COMMIT}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    close_session()  # the client made for this test dies with it
    yield server
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()


def load(hub, cache, repo=REPO, **options):
    return LearnablePruner.from_pretrained(repo, endpoint=hub.url, cache_dir=cache, **options)


@pytest.fixture
def the_hub(hub, tmp_path, monkeypatch):
    """The server as the one that a Hub id means, with a cache of its own; the client stays the real one."""
    download = partial(huggingface_hub.hf_hub_download, endpoint=hub.url, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(lp_patch.pruner, "hf_hub_download", download)
    monkeypatch.setattr(lp_patch.pruner, "HfApi", partial(huggingface_hub.HfApi, endpoint=hub.url))
    return hub


def downloads(hub):
    """Names of the files whose body was asked for, in order."""
    return [path.split("/")[-1] for command, path in hub.asked if command == "GET"]


def test_download(hub, pruner, tmp_path):
    loaded = load(hub, tmp_path / "cache")
    assert loaded.state_dict()["fc1.weight"].equal(pruner.fc1.weight)
    assert {path for _, path in hub.asked} == {
        f"/{REPO}/resolve/main/config.json",
        f"/{REPO}/resolve/main/model.safetensors",
    }


def test_cache_answers_when_the_hub_is_gone(hub, pruner, tmp_path):
    load(hub, tmp_path)
    asked = len(hub.asked)
    hub.files.clear()
    loaded = load(hub, tmp_path, local_files_only=True)
    assert loaded.state_dict()["fc2.weight"].equal(pruner.fc2.weight)
    assert len(hub.asked) == asked


def test_a_second_load_downloads_nothing(hub, pruner, tmp_path):
    load(hub, tmp_path)
    assert downloads(hub) == ["config.json", "model.safetensors"]
    hub.asked.clear()
    assert load(hub, tmp_path).fc1.weight.equal(pruner.fc1.weight)
    assert [command for command, _ in hub.asked] == ["HEAD", "HEAD"]


def test_what_changed_is_downloaded_again(hub, pruner, folder, tmp_path):
    load(hub, tmp_path / "cache")
    with torch.no_grad():
        pruner.fc1.weight.add_(1)
    pruner.save_pretrained(folder)
    hub.files["model.safetensors"] = (folder / "model.safetensors").read_bytes()  # the config's ETag stays
    hub.commit = COMMIT[::-1]
    hub.asked.clear()
    assert load(hub, tmp_path / "cache").fc1.weight.equal(pruner.fc1.weight)
    assert downloads(hub) == ["model.safetensors"]


def test_offline(hub, pruner, tmp_path, monkeypatch):
    load(hub, tmp_path / "cache")
    asked = len(hub.asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()  # the client reads it when it is made
    assert load(hub, tmp_path / "cache").fc1.weight.equal(pruner.fc1.weight)
    with pytest.raises(PrunerError, match=r"no pruner at 'org/pruner'.*LocalEntryNotFoundError"):
        load(hub, tmp_path / "empty")
    assert len(hub.asked) == asked


def test_cache_answers_when_the_server_is_down(hub, pruner, tmp_path, monkeypatch):
    load(hub, tmp_path)
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert load(hub, tmp_path).fc1.weight.equal(pruner.fc1.weight)


def test_another_width_is_refused_before_the_weights(the_hub):
    with pytest.raises(PrunerError, match="reads 6-wide features, this model has 24-wide ones"):
        lp_patch.apply(tiny_llava(), pruner=REPO)
    assert downloads(the_hub) == ["config.json"]


@pytest.fixture
def fitting(the_hub, tmp_path):
    """A pruner of the tiny model's width, on the Hub."""
    pruner = LearnablePruner(WIDTH, 5)
    pruner.save_pretrained(tmp_path / "fitting")
    the_hub.files = {p.name: p.read_bytes() for p in (tmp_path / "fitting").iterdir()}
    return pruner


def test_apply_by_hub_id(fitting):
    name, pruner = stage1(lp_patch.apply(tiny_llava(), pruner=REPO))
    assert name == "learned" and pruner.fc2.weight.equal(fitting.fc2.weight)


def test_the_table_of_known_pruners(the_hub, fitting, monkeypatch):
    monkeypatch.setitem(KNOWN_PRUNERS, "org/base", REPO)
    model = tiny_llava()
    for name in ("", "org/another", "/models/base", "base"):
        model.config._name_or_path = name
        assert stage1(lp_patch.apply(model)) == ("diversity", None)
    model.config._name_or_path = "org/base"
    lp_patch.apply(model, scorer="cls")
    assert the_hub.asked == []
    name, pruner = stage1(lp_patch.apply(model))
    assert name == "learned" and pruner.fc2.weight.equal(fitting.fc2.weight)
    del the_hub.files["config.json"]
    with pytest.raises(PrunerError, match=r"the pruner of 'org/base' \(scorer=.*no pruner at 'org/pruner'"):
        lp_patch.apply(model)


def test_revision_is_passed_on(hub, tmp_path):
    load(hub, tmp_path, revision="v1.0")
    assert {path.split("/")[4] for _, path in hub.asked} == {"v1.0"}
    with pytest.raises(PrunerError, match=r"no pruner at 'org/pruner'.*RevisionNotFoundError"):
        load(hub, tmp_path, revision="v2.0")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_repository_without_the_files(hub, tmp_path, name):
    del hub.files[name]
    with pytest.raises(PrunerError, match=r"no pruner at 'org/pruner'.*EntryNotFoundError"):
        load(hub, tmp_path)


def test_missing_repository(hub, tmp_path):
    with pytest.raises(PrunerError, match="no pruner at 'org/none': it is no folder here, and the Hub answered Repo"):
        load(hub, tmp_path, "org/none")


def test_nothing_cached_and_no_hub(hub, tmp_path):
    with pytest.raises(PrunerError, match=r"no pruner at 'org/pruner': .*LocalEntryNotFoundError"):
        load(hub, tmp_path, local_files_only=True)
    assert hub.asked == []


def test_no_server(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Hub(folder)
    server.server_close()  # its port is free again: connections are refused
    close_session()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its attempts
    with pytest.raises(PrunerError, match="no pruner at 'org/pruner'"):
        load(server, tmp_path)
    close_session()


@pytest.mark.parametrize("source", ["no such folder/at/all", "a b"])
def test_neither_a_folder_nor_a_hub_id(source):
    with pytest.raises(PrunerError, match="it is no folder here, and the Hub answered HFValidationError"):
        LearnablePruner.from_pretrained(source)


def test_damaged_files_from_the_hub(hub, tmp_path):
    hub.files["model.safetensors"] = hub.files["model.safetensors"][:-8]
    with pytest.raises(PrunerError, match=r"model.safetensors of 'org/pruner' cannot be read"):
        load(hub, tmp_path)


def test_connection_lost_half_way(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.missing_bytes = 8
    with pytest.raises(PrunerError, match="no pruner at 'org/pruner'"):
        load(hub, tmp_path)


@pytest.mark.skipif(not HUB_1, reason="before 1.0 the client gives up where an answer breaks off, and we say so")
@pytest.mark.parametrize("knows_ranges", [True, False])
@pytest.mark.parametrize("chunk", [64, None])
def test_connection_lost_and_found(hub, pruner, tmp_path, monkeypatch, knows_ranges, chunk):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    if chunk is not None:  # what the client has to have before it counts as received
        monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", chunk)
    hub.knows_ranges = knows_ranges
    half = len(hub.files["model.safetensors"]) // 2
    hub.cut_after = [half]
    loaded = load(hub, tmp_path)
    assert all(loaded.state_dict()[name].equal(tensor) for name, tensor in pruner.state_dict().items())
    assert downloads(hub) == ["config.json", "model.safetensors", "model.safetensors"]
    assert hub.ranges == ([] if chunk is None else [f"bytes={half - half % chunk}-"])


def test_a_download_that_failed_leaves_nothing_half(hub, pruner, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.cut_after = [100] * 50
    with pytest.raises(PrunerError, match="no pruner at 'org/pruner'"):
        load(hub, tmp_path)
    hub.cut_after = []
    assert load(hub, tmp_path).fc1.weight.equal(pruner.fc1.weight)


def test_misspelt_hub_option(tmp_path):
    with pytest.raises(TypeError, match="revison"):
        LearnablePruner.from_pretrained(REPO, cache_dir=tmp_path, revison="v1.0")


def test_push(the_hub, tmp_path):
    pushed = LearnablePruner(WIDTH, 5, **FACTS)
    assert pushed.push_to_hub(REPO, token="hf_x") == f"https://huggingface.co/{REPO}/commit/{COMMIT}"
    assert sorted(the_hub.files) == ["README.md", "config.json", "model.safetensors"]
    card = the_hub.files["README.md"].decode()
    assert the_hub.posted["/api/validate-yaml"][0]["content"] == card
    assert f'lp_patch.apply(model, pruner="{REPO}")' in card
    loaded = LearnablePruner.from_pretrained(REPO)
    assert facts(loaded) == FACTS and loaded.fc1.weight.equal(pushed.fc1.weight)


def test_push_says_what_was_asked(pruner, monkeypatch):
    api = create_autospec(huggingface_hub.HfApi, instance=True)  # refuses what the real client would
    made = create_autospec(huggingface_hub.HfApi, return_value=api)
    monkeypatch.setattr(lp_patch.pruner, "HfApi", made)
    assert pruner.push_to_hub(REPO, private=True, token="secret") is api.upload_folder.return_value.commit_url
    made.assert_called_once_with(token="secret")
    api.create_repo.assert_called_once_with(REPO, private=True, exist_ok=True)
