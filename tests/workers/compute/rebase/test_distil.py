import json
from pathlib import Path
from typing import Any

import pytest
import torch

from registry.core.errors import NotRunnable
from registry.core.recipes import Distil, Rebase
from tests.workers import factories
from tests.workers.compute.rebase.test_warm_start import drifted, starts
from workers.compute.data import Row, encoded
from workers.compute.finetune import finetune
from workers.compute.lora import Adapter
from workers.compute.model import Tokenizer
from workers.compute.rebase.distil import distil, is_written, read_lesson, write_lesson
from workers.compute.rebase.race import Chosen, as_raced, raced
from workers.compute.rebase.starts import SCRATCH, Starts
from workers.compute.rebase.warm_start import warm_start
from workers.compute.weights import write_tensors

TOKENIZER = factories.tokenizer()
ROWS = factories.rows(40)
RECIPE = factories.recipe(steps=60, batch_tokens=300, targets=("all-linear",))
ASKED = Distil(
    texts=120, max_new_tokens=8, steps=40, learning_rate=2e-3, batch_tokens=300, max_length=64, precision="fp32",
    seed=2, held_out=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> Adapter:
    return finetune(factories.llama(), TOKENIZER, RECIPE, ROWS).adapter


@pytest.fixture(scope="module")
def lesson(teacher: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the teacher answers to prompts."""
    return written(tmp_path_factory.mktemp("lesson"), teacher)


def written(folder: Path, teacher: Adapter, rows: Any = ROWS, **changes: Any) -> Path:
    asked = ASKED.model_copy(update=changes)
    write_lesson(factories.llama(), TOKENIZER, asked, teacher, rows, folder)
    return folder


def recipe(**changes: Any) -> Rebase:
    return Rebase(
        tier="distil", adapter=factories.ADAPTER, old=factories.OTHER_BASE, base=factories.BASE,
        distil=ASKED.model_copy(update=changes),
    )  # fmt: skip


def taught(folder: Path, found: Starts, tokenizer: Tokenizer = TOKENIZER, drift: float = 0.1) -> tuple[Chosen, Any]:
    model = drifted(factories.llama(), drift)
    race = distil(model, tokenizer, recipe(), folder, found)
    return raced(model, tokenizer, race), read_lesson(folder, tokenizer)


@pytest.mark.parametrize(("inputs", "drift"), [(ROWS, 0.2), ([], 0.3)], ids=["inputs", "texts of its own"])
def test_a_student_comes_closer_to_its_teacher_on_texts_held_out(
    inputs: list[Row], drift: float, teacher: Adapter, tmp_path: Path
) -> None:
    chosen, lesson = taught(written(tmp_path, teacher, inputs), starts(carry=teacher), drift=drift)
    assert lesson.by_logits
    assert chosen.start == "carry"
    before, after = chosen.starts["carry"], chosen.candidates["carry"]
    assert after["divergence"] < 0.9 * before["divergence"]
    assert after["agreement"] >= before["agreement"]
    assert after["divergence"] < chosen.candidates[SCRATCH]["divergence"]


def test_on_the_same_base_the_teacher_itself_is_the_student(lesson: Path, teacher: Adapter) -> None:
    race = distil(factories.llama(), TOKENIZER, recipe(), lesson, starts(carry=teacher))
    assert race.starts["carry"]["divergence"] == pytest.approx(0, abs=1e-4)
    assert race.starts["carry"]["agreement"] == 1
    assert race.starts["bare"]["divergence"] > 0.1


def test_a_start_is_held_to_where_it_began_and_a_fresh_adapter_is_not(lesson: Path, teacher: Adapter) -> None:
    for asked in ({}, {"pull": 0.5}):
        race = distil(factories.llama(), TOKENIZER, recipe(**asked), lesson, starts(carry=teacher))
        pulls = {name: entrant.task.recipe.pull for name, entrant in race.entrants.items()}
        assert pulls == {"carry": asked.get("pull", 0.01), SCRATCH: 0}


def test_labels_are_not_read(teacher: Adapter, lesson: Path, tmp_path: Path) -> None:
    blind = [Row({"prompt": row.value["prompt"], "completion": "?"}, row.path, row.line) for row in ROWS]
    again = written(tmp_path, teacher, blind)
    for name in ("lesson.jsonl", "lesson.safetensors"):
        assert (again / name).read_bytes() == (lesson / name).read_bytes()


def test_another_seed_gives_other_texts_and_none_at_temperature_0(teacher: Adapter, tmp_path: Path) -> None:
    def texts(**changes: Any) -> list[Any]:
        folder = written(tmp_path / str(changes), teacher, [], **changes)
        return sorted(str(example.value) for example in read_lesson(folder, TOKENIZER).examples)

    assert texts(seed=1) != texts(seed=2)
    assert texts(seed=1, temperature=0.0) == texts(seed=2, temperature=0.0)


def test_texts_of_its_own_do_not_end_before_they_have_begun(teacher: Adapter, tmp_path: Path) -> None:
    examples = read_lesson(written(tmp_path, teacher, []), TOKENIZER).examples
    assert {example.prompt for example in examples} == {(TOKENIZER.bos_token_id,)}
    assert min(len(example.completions[0]) for example in examples) > ASKED.max_new_tokens // 4


def test_few_inputs_are_answered_again_and_again_where_answers_differ(teacher: Adapter, tmp_path: Path) -> None:
    often = read_lesson(written(tmp_path / "often", teacher, ROWS[:5]), TOKENIZER)
    once = read_lesson(written(tmp_path / "once", teacher, ROWS[:5], temperature=0.0), TOKENIZER)
    assert (len(often.examples), len(once.examples)) == (ASKED.texts, 5)


def test_a_student_of_another_vocabulary_learns_from_the_text(teacher: Adapter, lesson: Path) -> None:
    theirs = factories.tokenizer()
    theirs.add_tokens(["1+"])
    assert theirs.get_vocab() != TOKENIZER.get_vocab()
    model = factories.llama(vocab_size=260)
    race = distil(model, theirs, recipe(), lesson, Starts({"carry": teacher}, {}))
    assert race.told["lesson"]["through"] == "text"
    chosen = raced(model, theirs, race)
    assert chosen.candidates[chosen.candidate]["divergence"] < race.starts["bare"]["divergence"]


def test_only_a_text_that_came_to_its_end_teaches_an_end(teacher: Adapter, tmp_path: Path) -> None:
    cut = written(tmp_path, teacher, max_new_tokens=1)
    theirs = factories.tokenizer()
    theirs.add_tokens(["1+"])
    for example in read_lesson(cut, theirs).examples:
        assert example.end == ()
    assert all(len(example.ids) == len(example.prompt) + 1 for example in read_lesson(cut, TOKENIZER).examples)


def test_turns_of_a_chat_are_answered_behind_its_template(teacher: Adapter, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "no"}]
    chat = [Row({"messages": turns}, "chat.jsonl", 1)]
    [first, *_] = read_lesson(written(tmp_path, teacher, chat), TOKENIZER).examples
    assert first.prompt == encoded(TOKENIZER, chat)[0].prompt
    assert first.value["messages"][:-1] == turns[:-1]
    assert first.value["messages"][-1]["content"] != "no"


def test_without_a_start_that_fits_nothing_is_distilled(teacher: Adapter, lesson: Path) -> None:
    with pytest.raises(NotRunnable, match="its weight 48×48"):
        distil(factories.llama(hidden_size=48), TOKENIZER, recipe(), lesson, starts(carry=teacher))


def test_texts_that_are_all_alike_are_a_lesson_all_the_same(teacher: Adapter, tmp_path: Path) -> None:
    folder = written(tmp_path, teacher, ROWS[:1], temperature=0.0)
    race = distil(factories.llama(), TOKENIZER, recipe(), folder, starts(carry=teacher))
    assert race.told["lesson"]["texts"] == len(race.entrants[SCRATCH].task.rows) == 1


def test_equal_texts_are_taught_or_held_out_and_not_both(teacher: Adapter, tmp_path: Path) -> None:
    folder = written(tmp_path, teacher, ROWS[:3])
    race = distil(factories.llama(), TOKENIZER, recipe(held_out=0.2), folder, starts(carry=teacher))
    learnt = {str(row.value) for row in race.entrants[SCRATCH].task.rows}
    texts = {str(example.value) for example in read_lesson(folder, TOKENIZER).examples}
    assert 0.7 <= len(learnt) / len(texts) <= 0.8


def test_tokens_that_only_the_teacher_has_rows_for_count_among_the_others(teacher: Adapter, tmp_path: Path) -> None:
    folder = written(tmp_path, teacher, likeliest=259)
    cut = [example.taught for example in read_lesson(folder, TOKENIZER, 200).examples]
    assert all(said is not None and int(said.top_TK.max()) < 200 for said in cut)
    whole = [example.taught for example in read_lesson(folder, TOKENIZER).examples]
    for some, every in zip(cut, whole, strict=True):
        assert some is not None
        assert every is not None
        assert torch.equal(some.log_p_TK == -torch.inf, every.top_TK >= 200)


def test_what_is_half_written_is_no_lesson(lesson: Path, tmp_path: Path) -> None:
    assert is_written(lesson)
    (tmp_path / "lesson.jsonl").write_bytes((lesson / "lesson.jsonl").read_bytes())
    assert not is_written(tmp_path)


def test_students_and_warm_starts_go_through_one_run(lesson: Path, teacher: Adapter) -> None:
    model = drifted(factories.llama(), 0.1)
    short = RECIPE.model_copy(update={"steps": 5, "learning_rate": 3e-3})
    races = [
        distil(model, TOKENIZER, recipe(steps=5), lesson, starts(carry=teacher)),
        warm_start(model, TOKENIZER, short, [*ROWS, *factories.rows(60)[40:]], starts(carry=teacher), None),
    ]
    together = dict(as_raced(model, TOKENIZER, races))
    for place, race in enumerate(races):
        alone, beside = raced(model, TOKENIZER, race), together[place]
        assert isinstance(beside, Chosen)
        torch.testing.assert_close(
            torch.tensor(beside.trained.losses), torch.tensor(alone.trained.losses), rtol=1e-3, atol=1e-4
        )


def in_other_words(folder: Path, texts: list[str]) -> Path:
    """A lesson of chats by a teacher of another vocabulary, who said these texts."""
    folder.mkdir()
    with (folder / "lesson.jsonl").open("w") as file:
        for number, text in enumerate(texts):
            said = [{"role": "user", "content": str(number)}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"row": {"messages": said}, "tokens": 1, "ended": True}) + "\n")
    tensors = {"ids": torch.zeros(len(texts), dtype=torch.int32), "top": torch.zeros(len(texts), 1, dtype=torch.int32),
               "log_p": torch.zeros(len(texts), 1)}  # fmt: skip
    write_tensors(folder / "lesson.safetensors", tensors, {"vocabulary": "another"})
    return folder


def test_texts_that_the_students_template_takes_away_are_left_out_and_no_more(tmp_path: Path) -> None:
    student = factories.tokenizer()
    student.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    lesson = read_lesson(in_other_words(tmp_path / "some", ["yes", "\n", "", "no"]), student)
    assert [example.value["messages"][0]["content"] for example in lesson.examples] == ["0", "3"]
    nothing = in_other_words(tmp_path / "none", ["", "\n"])
    model = factories.llama()
    with pytest.raises(NotRunnable, match="wrote nothing"):
        distil(model, student, recipe(), nothing, Starts({"carry": factories.random_adapter(model)}, {}))
