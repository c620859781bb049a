"""Scores through the split model against those of the unsplit one, over real frames."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cutlayer import Client
from cutlayer.errors import BudgetExceeded, DataError
from cutlayer.evaluation.report import Evaluation, summaries
from cutlayer.evaluation.run import EvaluationOptions, evaluate
from cutlayer.evaluation.tasks import ChoiceItem, GenerateItem, Item, Prompt
from cutlayer.evaluation.text_metrics import METRICS
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

CONTEXTS = ("A cow says", "2 + 2 =", "The capital of France, said the old teacher, is", "x")
CHOICES = ((" moo", " meow", " m"), (" 4", " 5"), (" Paris", " Parma", " Rome"), ("yz", "yy"))
WIDE = EvaluationOptions()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def unsplit(model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model).eval()


@pytest.fixture
def client(model: Path, tmp_path: Path) -> Iterator[Client]:
    settings = client_settings(model, tmp_path)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        yield client


def choices() -> list[ChoiceItem]:
    return [
        ChoiceItem(where=f"f:{n}", prompt=Prompt(text=text), choices=some, answer=n % 2)
        for n, (text, some) in enumerate(zip(CONTEXTS, CHOICES, strict=True), 1)
    ]


def asking(text: str, num: int = 12, stop: Sequence[str] = ()) -> GenerateItem:
    return GenerateItem(
        where="f:9",
        prompt=Prompt(text=text),
        answers=("moo", "the moo of a cow"),
        metrics=METRICS.names,
        max_new_tokens=num,
        stop=tuple(stop),
    )


def plain_log_likelihood(unsplit: PreTrainedModel, context: list[int], choice: list[int]) -> float:
    with torch.no_grad():
        logits_SV = unsplit(torch.tensor([context + choice])).logits[0]
    log_probs_SV = torch.log_softmax(logits_SV, -1)
    places = range(len(context) - 1, len(context) + len(choice) - 1)
    return sum(float(log_probs_SV[p, t]) for p, t in zip(places, choice, strict=True))


def plain_reply(client: Client, unsplit: PreTrainedModel, prompt: str, num: int) -> str:
    tokens = client.tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        out = unsplit.generate(
            torch.tensor([tokens]), max_new_tokens=num, do_sample=False, pad_token_id=0
        )
    return client.tokenizer.decode(out[0, len(tokens) :], skip_special_tokens=True)


def run(client: Client, items: Sequence[Item], options: EvaluationOptions = WIDE) -> Evaluation:
    return evaluate(client, items, options)


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 1024])
def test_log_likelihoods_of_choices_equal_unsplit(
    client: Client, unsplit: PreTrainedModel, max_batch_tokens: int
) -> None:
    items = choices()
    result = run(client, items, EvaluationOptions(max_batch_tokens=max_batch_tokens))
    for item, outcome in zip(items, result.outcomes, strict=True):
        context = client.tokenizer(item.prompt.text)["input_ids"]
        plain = [
            plain_log_likelihood(unsplit, context, client.tokenizer(choice)["input_ids"])
            for choice in item.choices
        ]
        got = outcome.prediction["log_likelihoods"]
        torch.testing.assert_close(torch.tensor(got), torch.tensor(plain), atol=1e-5, rtol=0)
        per_character = [s / len(t) for s, t in zip(plain, item.choices, strict=True)]
        assert outcome.scores == {
            "accuracy": float(plain.index(max(plain)) == item.answer),
            "accuracy_normalised": float(per_character.index(max(per_character)) == item.answer),
        }


def test_no_more_leaves_than_contexts_and_beginnings_of_choices(client: Client) -> None:
    result = run(client, choices())
    expected = 0
    for context, some in zip(CONTEXTS, CHOICES, strict=True):
        beginnings = {text[:n] for text in some for n in range(1, len(text))}
        expected += len(context) + len(beginnings)
    assert client.ledger.num_vectors == {"generation": expected}
    assert result.cost.num_vectors_released == result.cost.num_tokens == expected
    assert result.cost.bytes_up > expected * 32 * 4
    assert result.guarantee == "no noise: none"


def test_scoring_again_with_noise_replays_whatever_goes_together(
    model: Path, tmp_path: Path
) -> None:
    noise = {"privacy__mechanism": "gaussian", "privacy__scale": 0.02}
    settings = client_settings(model, tmp_path, generation__prefill_tokens=16, **noise)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        first = run(client, choices())
        again = run(client, choices()[1:], EvaluationOptions(max_batch_tokens=40))
    assert first.cost.num_vectors_released == first.cost.num_tokens
    assert (again.cost.num_vectors_released, again.guarantee) == (0, "no guarantee (unclipped)")
    assert again.cost.num_vectors_replayed == again.cost.num_tokens
    for old, new in zip(first.outcomes[1:], again.outcomes, strict=True):
        got, wanted = (o.prediction["log_likelihoods"] for o in (new, old))
        torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), atol=1e-5, rtol=0)


def test_replies_and_their_scores_equal_unsplit(client: Client, unsplit: PreTrainedModel) -> None:
    prompts = ("ab:", "What does a cow say? ", "zz")
    result = run(client, [asking(prompt) for prompt in prompts])
    for prompt, outcome in zip(prompts, result.outcomes, strict=True):
        plain = plain_reply(client, unsplit, prompt, 12)
        assert outcome.prediction["reply"] == plain
        assert outcome.scores == {
            name: METRICS.make(name)(plain, ["moo", "the moo of a cow"]) for name in METRICS.names
        }


def test_each_reply_has_its_own_length_and_stop_text(
    client: Client, unsplit: PreTrainedModel
) -> None:
    whole = plain_reply(client, unsplit, "ab:", 20)
    stop = whole[6:8]
    result = run(client, [asking("ab:", 20, [stop]), asking("ab:", 3), asking("ab:", 20)])
    replies = [outcome.prediction["reply"] for outcome in result.outcomes]
    assert replies == [
        whole[: whole.index(stop)],
        plain_reply(client, unsplit, "ab:", 3),
        whole,
    ]


def test_kinds_may_be_mixed_and_keep_the_order_of_the_file(client: Client) -> None:
    done: list[int] = []
    items = [asking("ab:"), *choices(), asking("zz", 2)]
    result = evaluate(client, items, WIDE, lambda: done.append(1))
    kinds = [outcome.prediction["kind"] for outcome in result.outcomes]
    assert kinds == ["generate", *["choice"] * 4, "generate"]
    assert len(done) == 6
    counts = {name: summary.num_items for name, summary in summaries(result.outcomes).items()}
    assert counts == {
        "accuracy": 4,
        "accuracy_normalised": 4,
        **dict.fromkeys(METRICS.names, 2),
    }


def test_an_item_over_the_context_is_named_or_left_out(client: Client) -> None:
    items = [*choices(), asking("x" * 120, 9)]
    before = client.ledger
    with pytest.raises(DataError, match=r"f:9: 129 tokens in a context of 128.*--skip-long"):
        run(client, items)
    assert client.ledger == before
    result = run(client, items, EvaluationOptions(skips_long=True))
    assert (len(result.outcomes), len(result.skipped)) == (4, 1)
    with pytest.raises(DataError, match="no item to score is left of 1"):
        run(client, items[-1:], EvaluationOptions(skips_long=True))


def test_each_item_is_a_conversation_with_a_budget_of_its_own(model: Path, tmp_path: Path) -> None:
    limits = {"max_session_vectors": 60}
    settings = client_settings(model, tmp_path, privacy__generation=limits)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        assert run(client, choices() * 2).cost.num_vectors_released > 60
        with pytest.raises(BudgetExceeded, match="max_session_vectors"):
            run(client, [asking("x" * 59, 9)])


@pytest.mark.parametrize("items", [[asking("ab:")], choices()])
def test_a_budget_stops_the_evaluation(model: Path, tmp_path: Path, items: list[Item]) -> None:
    settings = client_settings(model, tmp_path, privacy__generation={"max_day_vectors": 9})
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        with pytest.raises(BudgetExceeded, match="max_day_vectors"):
            run(client, items, EvaluationOptions(max_batch_tokens=4))
        assert client.ledger.num_vectors.get("generation", 0) <= 9
