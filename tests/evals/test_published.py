"""Published sets: files, prompts, scores."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adakv_serve.evals.choice import FULL, Choice, Outcome
from adakv_serve.evals.published import metrics
from adakv_serve.evals.published.longbench import SETS, read_longbench
from adakv_serve.evals.published.questions import Question
from adakv_serve.evals.published.ruler import read_ruler
from adakv_serve.evals.published.run import run_published
from adakv_serve.evals.results.report import report
from adakv_serve.serving.models.embedded import embedded_model_path


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded_model_path())


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def longbench(tmp_path: Path) -> Path:
    """Write files of LongBench's format with hand-made rows."""
    prompts = {
        "hotpotqa": "Passages:\n{context}\nQuestion: {input}\nAnswer:",
        "trec": "Kinds of questions.\n{context}\n{input}",
        "lcc": "Go on with the code:\n{context}Next line:\n",
    }
    lengths = {"hotpotqa": 32, "trec": 64, "lcc": 64}
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "dataset2prompt.json").write_text(json.dumps(prompts))
    (tmp_path / "config" / "dataset2maxlen.json").write_text(json.dumps(lengths))
    common = {"length": 9, "language": "en", "_id": "a1"}
    write_lines(
        tmp_path / "data" / "hotpotqa.jsonl",
        [
            {
                **common, "dataset": "hotpotqa", "all_classes": None,
                "input": "Who wrote Emma?", "context": "Emma is a novel by Jane Austen.",
                "answers": ["Jane Austen", "Austen"],
            }
        ],
    )  # fmt: skip
    write_lines(
        tmp_path / "data" / "trec.jsonl",
        [
            {
                **common, "dataset": "trec", "all_classes": ["City", "Country", "Food"],
                "input": "Question: Where is Bath?\nType:", "context": "Question: What is jam?\n"
                "Type: Food", "answers": ["City"],
            }
        ],
    )  # fmt: skip
    write_lines(
        tmp_path / "data" / "lcc.jsonl",
        [
            {
                **common, "dataset": "lcc", "all_classes": None, "input": "",
                "context": "x = {1: 2}\n", "answers": ["print(x)"],
            }
        ],
    )  # fmt: skip
    return tmp_path


def test_longbench_is_read_and_asked_as_published(longbench: Path, tokenizer: Any) -> None:
    asked = {question.task: question for question in read_longbench(longbench)}
    assert list(asked) == ["hotpotqa", "trec", "lcc"]
    question = asked["hotpotqa"]
    prompt, begin = question.prompt(tokenizer, 1024, "aware")
    text = tokenizer.decode(prompt)
    assert "Passages:\nEmma is a novel by Jane Austen.\nQuestion: Who wrote Emma?\nAnswer:" in text
    assert text.endswith("<|im_start|>assistant\n")
    assert begin == []
    assert question.max_tokens == 32
    # Few-shot and code sets have no chat format.
    plain, _ = asked["lcc"].prompt(tokenizer, 1024, "aware")
    assert tokenizer.decode(plain) == "Go on with the code:\nx = {1: 2}\nNext line:\n"


def test_in_the_agnostic_mode_the_question_comes_after_the_document(
    longbench: Path, tokenizer: Any
) -> None:
    (question,) = read_longbench(longbench, ["hotpotqa"])
    aware, _ = question.prompt(tokenizer, 1024, "aware")
    prompt, begin = question.prompt(tokenizer, 1024, "agnostic")
    assert prompt + begin == aware
    assert "Jane Austen" in tokenizer.decode(prompt)
    assert "Who wrote Emma?" in tokenizer.decode(begin)
    assert "Who wrote Emma?" not in tokenizer.decode(prompt)


@pytest.mark.parametrize("mode", ["aware", "agnostic"])
def test_a_longer_prompt_loses_its_middle(tokenizer: Any, mode: Any) -> None:
    document = "First. " + "Filling words and more of them. " * 400 + "Last."
    question = Question("task", "1", document, "\nWhat came first?", 32, float)
    prompt, begin = question.prompt(tokenizer, 512, mode)
    assert 350 < len(prompt) + len(begin) <= 512 - 32
    text = tokenizer.decode(prompt + begin)
    assert "First." in text
    assert "Last.\nWhat came first?" in text
    assert ("What came first?" in tokenizer.decode(begin)) is (mode == "agnostic")


def test_a_chat_format_may_strip_the_prompt(tokenizer: Any) -> None:
    class Trimming:
        def apply_chat_template(self, asked: list[dict[str, str]], **_: Any) -> str:
            return f"<user>{asked[0]['content'].strip()}<assistant>"

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, *args: Any, **options: Any) -> Any:
            return tokenizer(*args, **options)

    question = Question("task", "1", "\nA document.", "\nWhat is it? ", 32, float)
    prompt, begin = question.prompt(Trimming(), 512, "agnostic")
    assert tokenizer.decode(prompt) == "<user>A document."
    assert tokenizer.decode(begin) == "\nWhat is it?<assistant>"


def test_longbench_answers_are_scored_as_published(longbench: Path) -> None:
    asked = {question.task: question for question in read_longbench(longbench)}
    assert asked["hotpotqa"].rate("The Austen.") == 1.0
    assert asked["hotpotqa"].rate("Jane") == pytest.approx(2 / 3)
    # Only the first line counts; classes that it names share the point.
    assert asked["trec"].rate("\nCity\nFood") == 1.0
    assert asked["trec"].rate("City or Food") == 0.5
    assert asked["trec"].rate("Village") == 0.0
    assert asked["lcc"].rate("# a comment\nprint(y)") == 0.88


def test_metrics_equal_scores_computed_by_hand() -> None:
    assert metrics.count("There are 7, not 8", "7") == 0.5
    assert metrics.count("none", "7") == 0.0
    assert metrics.paragraph("It is paragraph 12.", "Paragraph 12") == 1.0
    assert metrics.rouge_l("the cat sat", "the cat ran") == pytest.approx(2 / 3)
    assert metrics.rouge_l("", "the cat") == 0.0
    assert metrics.all_of("Seven and NINE", ["seven", "eight", "nine"]) == pytest.approx(2 / 3)
    assert metrics.any_of("the Thames", ["Seine", "thames"]) == 1.0


def test_a_class_whose_name_is_part_of_the_right_one_costs_nothing() -> None:
    assert metrics.named_class("a food market", "food market", ["food", "food market"]) == 1.0


def test_ruler_is_read_and_scored_as_published(tmp_path: Path, tokenizer: Any) -> None:
    write_lines(
        tmp_path / "niah_multivalue" / "validation.jsonl",
        [
            {
                "index": 0, "length": 60, "outputs": ["123", "456"],
                "input": "Hidden numbers.\nOne for tea is 123. One for tea is 456.\nWhat are all "
                "the special magic numbers for tea?", "answer_prefix": " The numbers are",
            }
        ],
    )  # fmt: skip
    write_lines(
        tmp_path / "qa_1" / "validation.jsonl",
        [{"index": 5, "input": "Documents.\nQuestion: Which river?", "outputs": ["Seine", "Oise"]}],
    )
    needles, river = read_ruler(tmp_path)
    assert (needles.max_tokens, river.max_tokens) == (128, 32)
    with pytest.raises(ValueError, match="and must not lose any: --context-tokens"):
        needles.prompt(tokenizer, 200, "aware")
    assert (needles.rate("456 alone"), needles.rate("456, 123")) == (0.5, 1.0)
    assert river.rate("the oise") == 1.0
    prompt, begin = needles.prompt(tokenizer, 1024, "agnostic")
    assert "456." in tokenizer.decode(prompt)
    assert tokenizer.decode(begin).endswith("<|im_start|>assistant\n The numbers are")


@pytest.mark.parametrize(
    ("line", "reason"), [("{", "line 1"), ('{"context": "x"}', "no input, answers")]
)
def test_files_that_are_not_as_published_are_refused(
    longbench: Path, line: str, reason: str
) -> None:
    (longbench / "data" / "trec.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=reason):
        list(read_longbench(longbench))


def test_missing_sets_tasks_and_settings_are_named(longbench: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown sets trek: known are narrativeqa"):
        list(read_longbench(longbench, ["trek"]))
    with pytest.raises(ValueError, match="has no prompt or length for qasper"):
        list(read_longbench(longbench, ["qasper"]))
    with pytest.raises(ValueError, match="has no <task>/validation"):
        list(read_ruler(tmp_path / "data"))
    assert len(SETS) == 16


class Parrot:
    """Engine that repeats the answers with the full cache and is silent with a compressed one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def answers(
        self, prompt: list[int], begin: list[int], max_tokens: int, choices: Iterable[Choice]
    ) -> dict[Choice, Outcome]:
        said = self.tokenizer.encode("Jane Austen City print(x)")
        return {one: Outcome(said if one.policy == FULL else []) for one in choices}


def test_a_report_of_published_sets_has_their_scores(longbench: Path, tokenizer: Any) -> None:
    tried = [Choice("ada_snapkv", tokens=64)]
    parts = run_published(
        Parrot(tokenizer), "parrot", read_longbench(longbench), tried, "aware", 1024
    )
    rows = [row for part in parts for row in part]
    assert [row.metric for row in rows[:2]] == [pytest.approx(2 / 3, abs=1e-4), 0.0]
    text = report(rows, baseline="full")
    assert "| score | all | 64 |" in text
    assert "Score less full's" in text
