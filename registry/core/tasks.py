"""Tasks of lm-eval that a suite may hold: what one may say here, and which rows it scores.

    {"lm_eval": {"tasks": [{"task": "capitals", "output_type": "multiple_choice",
                            "dataset_kwargs": {"data_files": {"test": "capitals.jsonl"}}, "test_split": "test",
                            "doc_to_text": "{{country}}:", "doc_to_choice": "cities", "doc_to_target": "right"}]}}

The keys are lm-eval's own. Left out is what would run code (`!function`, ``process_results``, ``unsafe_code``, …) or
reach outside of the suite (``include``, the hub, metrics that are fetched), and what is not greedy: a suite is data,
and its scores come out again. Templates are checked where they are rendered, in a sandbox.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from .errors import BadConfig
from .manifest import check_json
from .metrics import LM_EVAL

Kind = Literal["multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until"]
SCORES: dict[Kind, tuple[str, ...]] = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"),
    "loglikelihood": ("acc", "perplexity"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "generate_until": ("exact_match",),
}
"""What lm-eval scores single items of a task by; everything else of it is of whole tasks."""
_DEFAULT: dict[Kind, tuple[str, ...]] = {
    "multiple_choice": ("acc", "acc_norm"),
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "generate_until": ("exact_match",),
}
MAX_TASKS = 200


class _Said(BaseModel):
    """Frozen and without unknown keys; a number or truth value is no text, as YAML would have it of yes and no."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _top_jsonl(path: str) -> str:
    if "/" in path or path.startswith(".") or not path.endswith(".jsonl"):
        raise ValueError(f"'{path[:100]}' must be a .jsonl file at the top of the suite")
    return path


File = Annotated[str, AfterValidator(_top_jsonl)]


class DataFiles(_Said):
    """Split -> its files, as the JSON loader of Hugging Face's datasets takes them."""

    data_files: Annotated[dict[str, File | list[File]], Field(min_length=1)]


class Score(_Said):
    """An entry of ``metric_list``."""

    metric: str
    aggregation: Literal["mean", "perplexity", "weighted_perplexity", "bits_per_byte"] | None = None
    higher_is_better: bool | None = None
    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_numbers: bool = False
    regexes_to_ignore: list[str] | None = None


class Step(BaseModel):
    """One function of a filter, with its arguments."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    function: Literal[
        "lowercase", "uppercase", "map", "take_first", "take_first_k", "majority_vote", "regex", "regex_pos",
        "remove_whitespace", "multi_choice_regex",
    ]  # fmt: skip


class Filter(_Said):
    """How an answer is read out of an output."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]{1,64}$")]
    filter: Annotated[list[Step], Field(min_length=1)]


class Generation(_Said):
    """How far an output goes; it is always the likeliest one."""

    until: str | list[str] = []
    max_gen_toks: Annotated[int, Field(ge=1)] = 256
    do_sample: Literal[False] = False
    temperature: float = 0.0

    @model_validator(mode="after")
    def _greedy(self) -> Self:
        if self.temperature != 0:
            raise ValueError(f"temperature is {self.temperature:g}; outputs are greedy here, so 0 is allowed")
        return self


class Shots(_Said):
    """Where examples in front of a question come from, other than from a split."""

    sampler: Literal["default", "first_n"] = "default"
    samples: list[dict[str, Any]] | None = None


class Task(_Said):
    """A task by lm-eval's own words."""

    task: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    task_alias: str | None = None
    tag: str | list[str] | None = None
    dataset_path: Literal["json"] = "json"
    dataset_kwargs: DataFiles
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    fewshot_split: str | None = None
    output_type: Kind = "generate_until"
    doc_to_text: str
    doc_to_target: str | int
    doc_to_choice: str | list[str] | dict[str, str] | None = None
    description: str = ""
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    gen_prefix: str | None = None
    num_fewshot: Annotated[int, Field(ge=0)] = 0
    fewshot_config: Shots | None = None
    metric_list: Annotated[list[Score], Field(min_length=1)] | None = None
    generation_kwargs: Generation | None = None
    filter_list: Annotated[list[Filter], Field(min_length=1)] | None = None
    metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        splits = self.dataset_kwargs.data_files
        named = {self.training_split, self.validation_split, self.test_split, self.fewshot_split} - {None}
        if unknown := sorted(str(name) for name in named - splits.keys()):
            raise ValueError(f"split '{unknown[0]}' is not in data_files, which has {', '.join(splits)}")
        if not (self.test_split or self.validation_split):
            raise ValueError("test_split or validation_split must say which rows are scored")
        shots = self.fewshot_split or self.training_split
        given = self.fewshot_config is not None and self.fewshot_config.samples
        if self.num_fewshot and not given and (shots is None or set(self.files(shots)) & set(self.items())):
            raise ValueError("num_fewshot needs a fewshot_split, in files of its own, or samples in fewshot_config")
        for score in self.metric_list or ():
            if score.metric not in SCORES[self.output_type]:
                raise ValueError(
                    f"metric '{score.metric[:100]}' is not one that items of {self.output_type} have; allowed are "
                    f"{', '.join(SCORES[self.output_type])} (a suite without lm_eval has f1, bleu, chrf, rouge-l)"
                )
        if self.output_type == "multiple_choice" and self.doc_to_choice is None:
            raise ValueError("multiple_choice needs doc_to_choice")
        return self

    def files(self, split: str) -> list[str]:
        """The files of a split."""
        found = self.dataset_kwargs.data_files[split]
        return [found] if isinstance(found, str) else list(found)

    def items(self) -> list[str]:
        """The files whose rows are scored."""
        return self.files(str(self.test_split or self.validation_split))

    def metrics(self) -> list[str]:
        """The names of what its records are scored by."""
        names = [s.metric for s in self.metric_list] if self.metric_list else _DEFAULT[self.output_type]
        filters = [made.name for made in self.filter_list] if self.filter_list else ["none"]
        return [metric_of(name, made) for made in filters for name in names]


def metric_of(score: str, made: str) -> str:
    """The name of a metric by lm-eval's names of the score and of the filter, of which ``none`` goes unsaid."""
    return f"{LM_EVAL}{score}" + ("" if made == "none" else f",{made}")


_TASKS: TypeAdapter[list[Task]] = TypeAdapter(
    Annotated[list[Task], Field(min_length=1, max_length=MAX_TASKS)], config=ConfigDict(strict=True)
)


def parse_tasks(spec: dict[str, Any]) -> list[Task]:
    """The tasks of a suite's spec, none where it has no ``lm_eval``; `BadConfig` says what is not allowed."""
    if "lm_eval" not in spec:
        return []
    said = spec["lm_eval"]
    if not isinstance(said, dict) or said.keys() != {"tasks"}:
        raise BadConfig(path="suite.json", reason='lm_eval must be {"tasks": [...]} and nothing else')
    try:
        check_json(said)
    except ValueError as error:
        raise BadConfig(path="suite.json", reason=f"lm_eval.tasks: {error}") from error
    try:
        tasks = _TASKS.validate_python(said["tasks"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["lm_eval.tasks", *map(str, first["loc"])])
        told = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            told = "this key is not taken: it runs code, reaches outside of the suite, or has no meaning here"
            told += f"; allowed are {', '.join(Task.model_fields)}" if len(first["loc"]) == 2 else ""
        raise BadConfig(path="suite.json", reason=f"{where}: {told}") from error
    if twice := _twice(task.task for task in tasks):
        raise BadConfig(path="suite.json", reason=f"task '{twice}' is there twice")
    if twice := _twice(file for task in tasks for file in task.items()):
        raise BadConfig(path="suite.json", reason=f"'{twice}' is scored by two tasks; a row is scored once")
    return tasks


def _twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def require_files(tasks: Sequence[Task], there: Iterable[str]) -> frozenset[str]:
    """Those files of a suite whose rows are scored: all, or what its tasks name.

    `BadConfig` for a file that a task names and that is not there, and for one that no task names.
    """
    found = frozenset(there)
    if not tasks:
        return found
    named = {file for task in tasks for split in task.dataset_kwargs.data_files for file in task.files(split)}
    scored = frozenset(file for task in tasks for file in task.items())
    if missing := sorted(named - found):
        reason = f"the tasks name '{missing[0]}', which is not there; there are {', '.join(sorted(found))}"
        raise BadConfig(path="suite.json", reason=reason)
    if idle := sorted(found - named):
        raise BadConfig(path="suite.json", reason=f"no task names '{idle[0]}' in its data_files")
    return scored
