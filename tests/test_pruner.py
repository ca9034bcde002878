"""LearnablePruner: its numbers, its two files, and a Hub-shaped server on loopback that serves them."""

import hashlib
import json
import pickle
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lp_patch.pruner
from lp_patch import LearnablePruner, PrunerError
from lp_patch.pruner import resolve_pruner

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/pruner"


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
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
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
    }
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()} == {
        "fc1.weight": (5, 6),
        "fc1.bias": (5,),
        "fc2.weight": (2, 5),
        "fc2.bias": (2,),
    }


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
    ["", "{", "null", "[]", "3", '"x"', "{}", '{"format_version": 1, "hidden_size": 6}', '{"intermediate_size": 5}'],
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
    with pytest.raises(PrunerError, match="the pruner reads 6-wide features, this model has 24-wide ones"):
        resolve_pruner(pruner, 24)
    for wrong in (3, torch.nn.Linear(6, 2), LearnablePruner):
        with pytest.raises(PrunerError, match="must be a LearnablePruner, a folder or a Hub id, got "):
            resolve_pruner(wrong, 6)


# ---------------------------------------------------------------------- the Hub


class Hub(ThreadingHTTPServer):
    """What huggingface_hub's client asks for when it downloads a file, and a log of what it asked."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {p.name: p.read_bytes() for p in folder.iterdir()}
        self.revisions = {"main", "v1.0", COMMIT}
        self.asked = []
        self.missing_bytes = 0  # cut from each answer, though announced
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        body = self.answer()
        self.wfile.write(body[: len(body) - self.server.missing_bytes])

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
        body = b"" if error else self.server.files[name]
        self.send_response(404 if error else 200)
        if error:
            self.send_header("X-Error-Code", error)
        else:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    huggingface_hub.close_session()  # the client made for this test dies with it
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


def load(hub, cache, repo=REPO, **options):
    return LearnablePruner.from_pretrained(repo, endpoint=hub.url, cache_dir=cache, **options)


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
    huggingface_hub.close_session()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its attempts
    with pytest.raises(PrunerError, match="no pruner at 'org/pruner'"):
        load(server, tmp_path)
    huggingface_hub.close_session()


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


def test_misspelt_hub_option(tmp_path):
    with pytest.raises(TypeError, match="revison"):
        LearnablePruner.from_pretrained(REPO, cache_dir=tmp_path, revison="v1.0")


def test_push_uploads_what_save_writes(pruner, folder, monkeypatch):
    uploaded = {}

    def upload_folder(**given):
        uploaded.update({p.name: p.read_bytes() for p in Path(given["folder_path"]).iterdir()}, repo=given["repo_id"])
        return huggingface_hub.CommitInfo(
            commit_url="https://huggingface.co/org/pruner/commit/1", commit_message="", commit_description="", oid="1"
        )

    api = create_autospec(huggingface_hub.HfApi, instance=True)  # refuses what the real client would
    api.upload_folder.side_effect = upload_folder
    made = create_autospec(huggingface_hub.HfApi, return_value=api)
    monkeypatch.setattr(lp_patch.pruner, "HfApi", made)
    assert pruner.push_to_hub(REPO, private=True, token="secret") == "https://huggingface.co/org/pruner/commit/1"
    made.assert_called_once_with(token="secret")
    api.create_repo.assert_called_once_with(REPO, private=True, exist_ok=True)
    assert uploaded == {"repo": REPO, **{p.name: p.read_bytes() for p in folder.iterdir()}}
