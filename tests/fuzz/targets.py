"""What reads what strangers send: one target a reader, and the laws that hold of whatever it takes.

A reader returns a value or raises a refusal of ours with a code; anything else that leaves it is a finding. What it
takes can be written and read again to the same value, and what the registry would do with it next (fit, digests,
plans) does not fall either.
"""

import base64
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from hypothesis.strategies import SearchStrategy
from joserfc import jwt
from joserfc.jwk import KeySet, OKPKey

from cli.work import load_recipe
from registry.api.pages import behind, cursor
from registry.client import _messages
from registry.core import pool
from registry.core.adapter import AdapterSpec
from registry.core.audit import Head
from registry.core.base_model import BaseModel, Tensor, diff, tokenizer_digests
from registry.core.digest import Digest
from registry.core.engines import profiles
from registry.core.errors import LoractlError, UnknownProblem
from registry.core.fit import binding_evidence, fit, require_fit
from registry.core.manifest import Draft, Manifest, canonical_json, parse_listing
from registry.core.metrics import check_metric
from registry.core.names import BaseReference, Reference
from registry.core.recipes import inputs_of, parse_recipe, recipe_digest
from registry.core.records import Record, item_id, parse_records, split_of, summary, to_jsonl
from registry.core.rows import input_of, parse_input, parse_row
from registry.core.safetensors import Header, header_bytes, parse_header
from registry.core.tasks import parse_tasks, require_files
from registry.daemons.outbox import reachable
from registry.files import parse_json, read_spec
from registry.oidc import Provider
from registry.services.pushes import read_table
from registry.services.webhooks import check_url
from registry.settings import Grant, OidcSettings, Settings, WorkerSettings
from registry.storage.local import LocalStore
from tests.factories import adapter_config, llama_config
from tests.fuzz.inputs import jsons, safetensors, said, spliced, tables, texts, written

ZERO, ONE = "sha256:" + "0" * 64, "sha256:" + "1" * 64
BASE = "b3:" + "a" * 64
_SCRATCH = Path(tempfile.mkdtemp(prefix="loractl-fuzz-"))


@dataclass(frozen=True)
class Target:
    """A reader under test, what it is fed, and good inputs to begin from."""

    name: str
    read: Callable[[bytes], object]
    inputs: SearchStrategy[bytes]
    seeds: tuple[bytes, ...]
    guided: bool = True
    """Whether coverage can lead: not where most of the work is not Python's."""

    def outcome(self, data: bytes) -> str:
        """``taken``, or the code of our refusal; whatever else is raised is a finding."""
        try:
            self.read(data)
        except LoractlError as refusal:
            assert refusal.code and refusal.message, f"a refusal without a word: {refusal!r}"
            json.dumps(refusal.problem())
            assert LoractlError.from_problem(refusal.problem()).message == refusal.message
            return refusal.code
        return "taken"


# ── files of models ──────────────────────────────────────────────────────────

_SHAPES: dict[str, tuple[str, list[int]]] = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": ("F32", [4, 16]),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": ("F32", [16, 4]),
    "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": ("BF16", [4, 16]),
    "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": ("BF16", [32, 4]),
}
_DORA: dict[str, tuple[str, list[int]]] = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": ("F32", [4, 16]),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": ("F32", [16, 4]),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": ("F32", [16]),
    "base_model.model.model.embed_tokens.lora_embedding_A": ("F32", [4, 64]),
    "base_model.model.model.embed_tokens.lora_embedding_B": ("F32", [16, 4]),
    "base_model.model.lm_head.modules_to_save.weight": ("F32", [64, 16]),
}
_BASE_SHAPES: dict[str, tuple[str, list[int]]] = {
    "model.embed_tokens.weight": ("F32", [64, 16]),
    "model.layers.0.self_attn.q_proj.weight": ("F32", [16, 16]),
    "model.layers.0.mlp.up_proj.weight": ("F32", [32, 16]),
    "lm_head.weight": ("F32", [64, 16]),
}
_ADAPTER, _WITH_DORA, _BASE = tables(_SHAPES, _DORA, _BASE_SHAPES)
_METADATA = {"format": "pt", "loractl.base": BASE}
_CONFIG = adapter_config("org/model", targets=("q_proj", "up_proj"))


def _sized(data: bytes) -> tuple[bytes, int]:
    """``SIZE newline START``: the start of a file, and how large it says to be; without a size it is all of it."""
    size, newline, start = data.partition(b"\n")
    if not newline or not size.isdigit() or len(start) < 64:
        return data, len(data)
    told = min(int(size[:20]), 1 << 64)
    return start[:told], max(told, len(start[:told]))


def _written_again(header: Header) -> bytes:
    begin = header.tensors[0].start
    table: dict[str, Any] = {
        t.name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.start - begin, t.end - begin]}
        for t in header
    }
    return safetensors({"__metadata__": dict(header.metadata), **table})


def _header(data: bytes) -> None:
    start, size = _sized(data)
    if size > 8 + 1:
        needed = header_bytes(start[:64], size, "x")
        assert needed <= size
    header = parse_header(start, size, "x")
    again = _written_again(header)
    twin = parse_header(again, len(again) + sum(t.size for t in header), "x")
    shift = twin.tensors[0].start - header.tensors[0].start
    assert [(t.name, t.dtype, t.shape, t.start + shift) for t in header] == [
        (t.name, t.dtype, t.shape, t.start) for t in twin
    ]
    assert twin.metadata == header.metadata


def _headers_of(told: Any) -> dict[str, Header]:
    """A header as JSON, in a file just so large that it may be right."""
    start = safetensors(told)
    ends = [
        entry["data_offsets"][1]
        for entry in told.values()
        if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list) and len(entry["data_offsets"]) == 2
    ]
    size = max([end for end in ends if type(end) is int and 0 <= end < 1 << 50], default=0)
    return {"adapter_model.safetensors": parse_header(start, len(start) + size, "adapter_model.safetensors")}


def _rows(header: Header) -> list[Tensor]:
    return [Tensor(t.name, t.dtype, t.shape, Digest.of_raw("b3", Digest.sha256(t.name.encode()).raw)) for t in header]


_KNOWN = BaseModel.of(
    _rows(parse_header(safetensors(_BASE), len(safetensors(_BASE)) + 4 * (2 * 64 + 16 + 32) * 16, "base")),
    llama_config(layers=1),
)


def _adapter(data: bytes) -> None:
    told = parse_json(data, "input")
    config, header = told.get("config"), told.get("header")
    if not isinstance(config, dict) or not isinstance(header, dict):
        return
    spec = AdapterSpec.parse(config, _headers_of(header))
    for module in spec.modules:
        assert module.rank > 0
        assert module.shape[0] > 0
    assert (spec.max_rank, spec.features, spec.targets) == (spec.max_rank, spec.features, spec.targets)
    profiles(spec)
    fit(spec, _KNOWN)
    canonical_json([spec.recorded, spec.declared_base, spec.declared_revision, spec.why_not_runnable])
    require_fit(spec, _KNOWN, {"other": _KNOWN}, path="DIR", name="team/bot")
    binding_evidence(spec, _KNOWN.digest)


def _base(data: bytes) -> None:
    told = parse_json(data, "input")
    config, header, files = told.get("config"), told.get("header"), told.get("tokenizer")
    if not isinstance(header, dict) or not isinstance(config, dict | None):
        return
    texts = (
        {n: one.encode("utf-8", "surrogatepass") for n, one in files.items() if isinstance(one, str)}
        if isinstance(files, dict)
        else {}
    )
    [found] = _headers_of(header).values()
    model = BaseModel.of(_rows(found), config, tokenizer_digests(texts))
    again = BaseModel.from_json(model.to_json())
    assert again.digest == model.digest
    assert diff(model, again).empty
    diff(model, _KNOWN)


def _table(data: bytes) -> None:
    model = BaseModel.from_json(data)
    again = BaseModel.from_compressed(model.to_compressed())
    assert again.digest == model.digest
    assert again.to_json() == model.to_json()
    diff(model, _KNOWN)


def _packed(data: bytes) -> None:
    model = read_table(said(data))
    assert read_table(base64.b64encode(model.to_compressed()).decode()).digest == model.digest


# ── manifests, recipes, rows ─────────────────────────────────────────────────


def _manifest(data: bytes) -> None:
    made = Manifest.parse(data)
    again = Manifest.parse(made.canonical())
    assert again.canonical() == made.canonical()
    assert (again.digest, again.size) == (made.digest, made.size)


def _listing(data: bytes) -> None:
    made = parse_listing(parse_json(data, "input"))
    again = parse_listing(json.loads(made.canonical()))
    assert again.canonical() == made.canonical()
    if isinstance(made, Draft):
        sealed = made.sealed({entry.path: ZERO for entry in made.late})
        assert [entry.path for entry in sealed.files] == [entry.path for entry in made.files]


def _recipe(data: bytes) -> None:
    recipe = parse_recipe(data)
    again = parse_recipe(recipe.model_dump(mode="json"))
    assert recipe_digest(again) == recipe_digest(recipe)
    assert inputs_of(again) == inputs_of(recipe)
    assert recipe_digest(parse_recipe(canonical_json(recipe.model_dump(mode="json")))) == recipe_digest(recipe)


def _toml(data: bytes) -> None:
    place = _SCRATCH / "recipe.toml"
    place.write_bytes(data)
    parse_recipe(load_recipe(place).recipe)


def _row(data: bytes) -> None:
    for parse in (parse_row, parse_input):
        try:
            row = parse(data, "data.jsonl", 1)
        except LoractlError:
            if parse is parse_input:
                raise
            continue
        item = item_id(row)
        assert split_of(item)
        assert item_id(parse(canonical_json(row), "data.jsonl", 1)) == item
        pool.input_id(row)
        input_of(row)


def _records(data: bytes) -> None:
    records = parse_records(data)
    again = parse_records(to_jsonl(records))
    assert to_jsonl(again) == to_jsonl(records)
    json.dumps(summary(records))


def _answers(data: bytes) -> None:
    answers = pool.parse_answers(data)
    assert pool.parse_answers(pool.to_jsonl(list(answers.values()))) == answers


_PAPER = {"0123456789abcdef": {"a": "4", "b": "5"}, "fedcba9876543210": {"a": "x", "b": "y", "c": "z"}}


def _labels(data: bytes) -> None:
    labels = pool.parse_labels(data, _PAPER, campaign="c1", adapter="team/bot")
    assert pool.stored_labels(pool.to_labels(labels)) == labels
    assert labels.keys() == _PAPER.keys()


def _tasks(data: bytes) -> None:
    tasks = parse_tasks(parse_json(data, "suite.json"))
    require_files(tasks, ["capitals.jsonl"])
    for task in tasks:
        for metric in task.metrics():
            check_metric(metric)


def _yaml(data: bytes) -> None:
    folder = _SCRATCH / "suite"
    folder.mkdir(exist_ok=True)
    (folder / "suite.json").write_text('{"lm_eval": {"tasks": ["task.yaml"]}}')
    (folder / "task.yaml").write_bytes(data)
    spec = read_spec(folder)
    parse_tasks(spec)
    assert len(canonical_json(spec)) < 1 << 20


# ── what people and clients say ──────────────────────────────────────────────


def _reference(data: bytes) -> None:
    text = said(data)
    kind: type[Reference] | type[BaseReference]
    for kind in (Reference, BaseReference):
        try:
            found = kind.parse(text)
        except LoractlError:
            if kind is BaseReference:
                raise
            continue
        assert str(found) == text
        assert kind.parse(str(found)) == found
        return


def _digest(data: bytes) -> None:
    found = Digest.parse(said(data))
    assert str(found) == said(data)
    assert Digest.of_raw(found.algorithm, found.raw) == found


def _head(data: bytes) -> None:
    found = Head.parse(said(data))
    assert Head.parse(str(found)) == found
    assert found.seq >= 0


def _cursor(data: bytes) -> None:
    for start in (("",), (0,), ("", 0), ("", "", 0)):
        try:
            key = behind(said(data), start)
        except LoractlError:
            if len(start) == 3:
                raise
            continue
        assert behind(cursor(*key), start) == key
        canonical_json(key)


def _webhook(data: bytes) -> None:
    """What the door takes, the daemon that delivers must be able to use."""
    url = said(data)
    check_url(url)
    if (urlsplit(url).hostname or "").replace(".", "").isdigit():  # no names are looked up here
        with suppress(OSError):
            reachable(url, private=False)


_STORE = LocalStore(_SCRATCH / "store", "http://localhost", b"a key of tests", clock=lambda: 1_700_000_000.0)
_SIGNED = urlsplit(_STORE.presign_put("blobs/ab", size=10, sha256=Digest.parse(ZERO), expires_s=60).url)
_PART = urlsplit(_STORE.presign_part("blobs/ab", "u1", 2, size=1, sha256=Digest.parse(ZERO), expires_s=60).url)


def _signed(data: bytes) -> None:
    key, _, query = data.decode("utf-8", "replace").partition("?")  # as Starlette gives them
    granted = _STORE.granted("PUT", key, dict(parse_qsl(query)))
    assert granted.key == "blobs/ab", "only what was signed is granted"
    assert granted.sha256 == Digest.parse(ZERO)


_KEY = OKPKey.generate_key("Ed25519", {"kid": "k"})
_ISSUER = "https://accounts.example.org"


class _Known(Provider):
    """A provider whose keys are here already."""

    def _published(self) -> KeySet:
        return KeySet([_KEY])


_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_PROVIDER = _Known(
    OidcSettings(_ISSUER, "loractl", "loractl", (Grant("groups", "ml", {"team": ["read"]}),)), lambda: _NOW
)
_CLAIMS = {
    "iss": _ISSUER, "aud": "loractl", "sub": "kim", "exp": int(_NOW.timestamp()) + 60, "iat": int(_NOW.timestamp()),
    "nbf": int(_NOW.timestamp()), "email": "kim@example.org", "groups": ["ml", "all"],
}  # fmt: skip


_TOKEN = jwt.encode({"alg": "Ed25519", "kid": "k"}, _CLAIMS, _KEY, algorithms=["Ed25519"]).encode()
_NESTED = b".".join([base64.urlsafe_b64encode(b"[" * 30_000).rstrip(b"="), *_TOKEN.split(b".")[1:]])
"""A head that no reader gets to the end of."""


def _claims(data: bytes) -> None:
    """Claims that the provider signed, and texts that it did not."""
    text = said(data)
    if text.startswith("{"):
        told = parse_json(data, "claims")
        try:
            text = jwt.encode({"alg": "Ed25519", "kid": "k"}, told, _KEY, algorithms=["Ed25519"])
        except (ValueError, TypeError):  # no provider could sign this
            return
    person = _PROVIDER.person(text)
    assert person.scopes == {"team": ["read"]}
    canonical_json([person.id, person.name, person.until.isoformat()])


def _problem(data: bytes) -> None:
    """What a client makes of an answer that is none of ours."""
    told = parse_json(data, "answer")
    error = LoractlError.from_problem(told)
    json.dumps(error.problem())
    if isinstance(told.get("code"), str) and told["code"] not in LoractlError.by_code:
        assert isinstance(error, UnknownProblem)


def _events(data: bytes) -> None:
    for message in _messages(data.decode("utf-8", "replace").splitlines()):
        assert {"id", "event", "data"} <= message.keys()


def _settings(data: bytes) -> None:
    env = {f"LORACTL_{name}": str(value) for name, value in parse_json(data, "environment").items()}
    for settings in (Settings, WorkerSettings):
        settings.from_environment(env)


# ── the list ─────────────────────────────────────────────────────────────────

_FILE = {"path": "adapter_model.safetensors", "size": 10, "digest": ZERO}
_MANIFEST = {
    "schema": "loractl/1", "kind": "adapter", "files": [{"path": "adapter_config.json", "size": 2, "digest": ONE}, _FILE],
    "base": BASE, "config": _CONFIG, "lineage": {"parents": [ZERO], "datasets": [ONE], "recipe": {"kind": "finetune"}},
}  # fmt: skip
_DRAFT = {
    "schema": "loractl/1", "kind": "base", "base": BASE, "config": {},
    "files": [{"path": "config.json", "size": 2, "digest": ONE}, {"path": "m/model.safetensors", "size": 9, "tensors": ["a"]}],
}  # fmt: skip
_TRAINING: dict[str, Any] = {
    "kind": "finetune", "base": BASE, "datasets": [ZERO], "targets": ["q_proj"], "rank": 8, "alpha": 16.0, "steps": 10,
    "learning_rate": 1e-3, "dropout": 0.1, "seed": 7, "schedule": "cosine",
}  # fmt: skip
_RECIPES: list[dict[str, Any]] = [
    _TRAINING,
    {"kind": "full-finetune", "base": BASE, "datasets": [ZERO]},
    {"kind": "evaluate", "base": BASE, "suite": ZERO, "adapters": [ONE]},
    {"kind": "answers", "base": BASE, "suite": ZERO, "metric": "accuracy", "inputs": ONE, "bare": True},
    {"kind": "merge", "base": BASE, "adapter": ZERO, "dtype": "bf16"},
    {"kind": "rebase", "tier": "retrain", "adapter": ZERO, "old": BASE, "base": BASE, "training": _TRAINING},
    {"kind": "rebase", "tier": "distil", "adapter": ZERO, "old": BASE, "base": BASE, "distil": {"steps": 3}},
    {"kind": "combine", "base": BASE, "adapters": [ZERO, ONE], "method": "ties", "density": 0.2, "weights": [1, -0.5]},
    {"kind": "compress", "base": BASE, "adapter": ZERO, "energy": 0.9},
    {"kind": "extract", "base": BASE, "tuned": BASE, "rank": 4},
    {"kind": "search", "base": BASE, "suite": ZERO, "training": _TRAINING},
    {"kind": "compare", "base": BASE, "old": BASE, "adapters": [ZERO]},
]
_TOML = (
    b'kind = "finetune"\nbase = "' + BASE.encode() + b'"\ndatasets = ["' + ZERO.encode() + b'"]\ntargets = ["q_proj"]\n'
    b'rank = 8\nlearning_rate = 1e-3\nlong_rows = "cut"\n[output]\nadapter = "team/bot"\naliases = ["prod"]\n'
)
_ROWS: list[dict[str, Any]] = [
    {"prompt": "2+2=", "completion": " 4", "references": ["four"]},
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
    {"prompt": "2+2=", "choices": [" 3", " 4"], "answer": 1},
]
_TASK = {
    "task": "capitals", "output_type": "multiple_choice", "dataset_kwargs": {"data_files": {"test": "capitals.jsonl"}},
    "test_split": "test", "doc_to_text": "{{country}}:", "doc_to_choice": "cities", "doc_to_target": "right",
    "metric_list": [{"metric": "acc", "aggregation": "mean"}], "num_fewshot": 0,
    "filter_list": [{"name": "strict", "filter": [{"function": "regex", "regex_pattern": "a"}]}],
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
}  # fmt: skip
_YAML = (
    b"task: capitals\noutput_type: multiple_choice\ndataset_kwargs: {data_files: {test: capitals.jsonl}}\n"
    b'test_split: test\ndoc_to_text: "{{country}}:"\ndoc_to_choice: &c [a, b]\ndoc_to_target: !!int "1"\ntag: *c\n'
)
_ITEMS = [item_id(row) for row in _ROWS]
_RECORDS = to_jsonl(
    Record(item=item, split=split_of(item), metrics={"likelihood": -0.4, "accuracy": 1}, parsed=True, output="x")
    for item in _ITEMS
)
_ANSWERS = pool.to_jsonl([pool.Answered(item=pool.input_id(row), input=input_of(row), answer=" 4") for row in _ROWS])
_LABELLED = b"\n".join(
    written({"item": item, "prompt": "?", "answers": answers, "right": right})
    for (item, answers), right in zip(_PAPER.items(), ("a", "a, b"), strict=True)
)
_TABLE = _KNOWN.to_json()
_PACKED = base64.b64encode(_KNOWN.to_compressed())
_HEADER = safetensors({"__metadata__": _METADATA, **_ADAPTER})
_DATA_SIZE = max(entry["data_offsets"][1] for entry in _ADAPTER.values())
_HEADER_SIZE = str(len(_HEADER) + _DATA_SIZE).encode()
_TOKENIZER = {
    "tokenizer.json": json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}, "added_tokens": []}),
    "tokenizer_config.json": json.dumps({"bos_token": {"content": "<s>"}, "chat_template": "{{ x }}"}),
    "vocab.txt": "a\nb",
}
_FORMS: list[Any] = [{"model": ["x"]}, {"model": {"merges": 3}}, {"model": None, "decoder": [[]]}, [1]]
_ODD: list[Any] = [{"chat_template": 3}, {"bos_token": []}, {"eos_token": {}}]
_TOKENIZERS = [{"tokenizer.json": written(one).decode()} for one in _FORMS]
_TOKENIZERS += [{"tokenizer_config.json": written(one).decode()} for one in _ODD]
_ADAPTERS = [
    {"config": _CONFIG, "header": {"__metadata__": _METADATA, **_ADAPTER}},
    {"config": _CONFIG | {"use_dora": True, "rank_pattern": {"q_proj": 4}, "modules_to_save": ["lm_head"]}, "header": _WITH_DORA},
    {"config": {"peft_type": "IA3", "base_model_name_or_path": "m"}, "header": _ADAPTER},
]  # fmt: skip
_BASES = [
    {"config": llama_config(layers=1), "header": _BASE, "tokenizer": _TOKENIZER},
    {"config": {"model_type": "gpt2", "n_embd": 16}, "header": _BASE},
    *({"config": {"model_type": "other"}, "header": _BASE, "tokenizer": some} for some in _TOKENIZERS),
]
_REFERENCES = ("team/bot", "team/bot:prod", "team/bot@v7", f"team/bot@{ZERO}", "llama", "llama@r2", BASE)
_URLS = (
    "https://hooks.example.org/a?b=c", "http://10.0.0.1:80/", "http://[::1]:8080/x", "http://a.b:99999/", "http://[x/",
    "https://xn--bcher-kva.example", "http://127.1", "http://a..b/", "http://1.1.1.1:0", "http://user:pw@h/",
)  # fmt: skip
_PROBLEMS = [
    LoractlError.by_code[code](**dict.fromkeys(LoractlError.by_code[code].fact_names(), 3)).problem()
    for code in ("bad-name", "file-too-large", "gate-not-passed", "internal-error", "bad-header")
]
_ENVIRONMENT = {
    "MODE": "embedded", "DATABASE_URL": "sqlite://", "BROKER_URL": "memory://", "PUBLIC_URL": "http://x", "SIGNING_KEY": "k",
    "DATA": "data", "LEASE_S": "60", "URL": "http://x", "TOKEN": "t", "OIDC_ISSUER": "https://x", "OIDC_CLIENT_ID": "c",
    "OIDC_GRANTS": '[{"claim": "groups", "value": "ml", "scopes": {"team": ["read"]}}]', "LOG_LEVEL": "info",
}  # fmt: skip


def _in_a_file(header: bytes) -> bytes:
    """A header with the size of a file in which it could be right."""
    return b"%d\n%b" % (8 + len(header) + _DATA_SIZE, safetensors(header))


def _json_target(name: str, read: Callable[[bytes], object], *examples: Any) -> Target:
    return Target(name, read, jsons(*examples), tuple(map(written, examples)))


def _lines_target(name: str, read: Callable[[bytes], object], *examples: bytes) -> Target:
    """Lines of JSON: whole ones near the first line, and bytes near all of them."""
    lines = tuple(json.loads(line) for line in examples[0].splitlines())
    return Target(name, read, jsons(*lines) | spliced(*examples), examples)


def _text_target(name: str, read: Callable[[bytes], object], *examples: str) -> Target:
    return Target(name, read, texts(*examples), tuple(text.encode() for text in examples))


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "header", _header,
            jsons({"__metadata__": _METADATA, **_ADAPTER}).map(_in_a_file)
            | spliced(_HEADER_SIZE + b"\n" + _HEADER, b"18446744073709551615\n" + _HEADER, _HEADER, b"\x80\x04" + _HEADER),
            (_HEADER_SIZE + b"\n" + _HEADER, _HEADER, (1 << 63).to_bytes(8, "little") + b"{", b"GGUF" + bytes(20),
             b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ),
        _json_target("adapter", _adapter, *_ADAPTERS),
        _json_target("base", _base, *_BASES),
        Target("base-table", _table, jsons(json.loads(_TABLE)), (_TABLE,)),
        Target("packed-table", _packed, spliced(_PACKED), (_PACKED,)),
        _json_target("manifest", _manifest, _MANIFEST, _DRAFT),
        _json_target("listing", _listing, _MANIFEST, _DRAFT),
        _json_target("recipe", _recipe, *_RECIPES),
        Target("recipe-file", _toml, spliced(_TOML), (_TOML,)),
        _json_target("rows", _row, *_ROWS),
        _lines_target("records", _records, _RECORDS),
        _lines_target("answers", _answers, _ANSWERS),
        _lines_target("labels", _labels, _LABELLED),
        _json_target("tasks", _tasks, {"lm_eval": {"tasks": [_TASK]}}),
        Target("task-file", _yaml, spliced(_YAML), (_YAML,)),
        _text_target("reference", _reference, *_REFERENCES),
        _text_target("digest", _digest, ZERO, BASE),
        _text_target("audit-head", _head, f"12:{ZERO}", f"-1:{ZERO}", f"٣:{ZERO}"),
        _text_target("cursor", _cursor, cursor("a"), cursor(3), cursor("a", 3), cursor("a", "b", 1 << 62), cursor("\ud800")),
        _text_target("webhook", _webhook, *_URLS),
        _text_target("signed-url", _signed, *(f"{url.path.removeprefix('/store/')}?{url.query}" for url in (_SIGNED, _PART))),
        Target(
            "claims", _claims,
            jsons(_CLAIMS, _CLAIMS | {"exp": 1e300}, _CLAIMS | {"sub": "\ud800"}) | spliced(_TOKEN, _NESTED),
            (written(_CLAIMS), _TOKEN, _NESTED),
        ),
        _json_target("problem", _problem, *_PROBLEMS),
        Target("events", _events, spliced(b"id: 1\nevent: job\ndata: {}\n\n: keep\n\n"), (b"id: 1\nevent: job\ndata: {}\n\n",)),
        _json_target("settings", _settings, _ENVIRONMENT),
    )
}  # fmt: skip
