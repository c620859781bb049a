"""The serving benchmark: its sums are right, its prompts are what it says, its worlds run."""

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.serving import _parse
from benchmarks.serving_client import Job, Steps, StreamSpec
from benchmarks.serving_clients import ClientsCase, measure_clients
from benchmarks.serving_link import LinkFigures, PromptFigures
from benchmarks.serving_naive import mechanism_parts, timed_lengths
from benchmarks.serving_prompts import (
    Style,
    copied_share,
    free_prompts,
    long_prompt,
    source_prompts,
)
from benchmarks.serving_statistics import (
    common_rates,
    jain_index,
    same_distribution_p,
    token_ms,
)
from benchmarks.serving_world import Worlds, owner_names, parse_metrics, served_model
from benchmarks.split import make_kits
from benchmarks.subjects import write_text_llama, write_tiny_llama


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(text_model: Path) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(text_model)
    return found


def test_equal_shares_are_fair_and_one_taker_is_not() -> None:
    assert jain_index([3.0, 3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain_index([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def test_only_time_in_which_all_streams_decode_counts() -> None:
    early, late = [0.0, 1.0, 2.0, 3.0, 4.0], [2.0, 2.5, 3.0, 3.5, 4.0, 4.5]
    rates = common_rates([early, late])
    assert (rates.begin_s, rates.end_s) == (2.0, 4.0)
    assert rates.tokens_per_s == pytest.approx((1.0, 2.0))
    assert rates.total == pytest.approx(3.0)


def test_tokens_that_come_together_all_count() -> None:
    assert common_rates([[0.0, 1.0, 1.0, 1.0, 2.0]]).total == pytest.approx(2.0)


def test_streams_that_never_decode_at_once_count_from_the_first_to_the_last() -> None:
    rates = common_rates([[0.0, 1.0], [3.0, 4.0]])
    assert (rates.begin_s, rates.end_s) == (0.0, 4.0)
    assert rates.total == pytest.approx(0.5)


def test_slow_first_tokens_are_no_part_of_a_token_s_time() -> None:
    assert token_ms([0.0, 5.0, 6.0, 6.1, 6.2, 6.3]) == pytest.approx(100.0)


def test_two_samples_of_one_law_pass_and_of_two_laws_fail() -> None:
    draws = random.Random(0)
    one, same = ([draws.choice("aabc") for _ in range(2000)] for _ in range(2))
    other = [draws.choice("abcc") for _ in range(2000)]
    assert same_distribution_p(one, same) > 0.01
    assert same_distribution_p(one, other) < 1e-6


def test_the_chi_square_test_is_the_textbook_s() -> None:
    """A table of 10, 20 and 20, 10: statistic 20 / 3 with one degree of freedom, p = 0.00982."""
    one, other = "a" * 10 + "b" * 20, "a" * 20 + "b" * 10
    assert same_distribution_p(one, other) == pytest.approx(0.009823, abs=1e-6)


def test_p_values_of_equal_laws_are_spread_evenly() -> None:
    draws = random.Random(1)
    p_values = [
        same_distribution_p(
            [draws.randrange(6) for _ in range(300)], [draws.randrange(6) for _ in range(600)]
        )
        for _ in range(300)
    ]
    assert sum(p < 0.1 for p in p_values) / 300 == pytest.approx(0.1, abs=0.06)
    assert sum(p < 0.5 for p in p_values) / 300 == pytest.approx(0.5, abs=0.1)


def test_rare_outcomes_count_as_one() -> None:
    assert same_distribution_p(list(range(100)), list(range(100, 200))) == 1.0


def test_counters_are_read_by_name_and_summed_over_labels() -> None:
    text = '# HELP a b\na_total{who="x"} 2\na_total{who="y"} 3.5\nb 1e3\n'
    assert parse_metrics(text) == {"a_total": 5.5, "b": 1000.0}


def test_a_reply_that_copies_is_known_from_one_that_does_not() -> None:
    prompt = list(range(20))
    assert copied_share(prompt, [5, 6, 7, 8, 9]) == 1.0
    assert copied_share(prompt, [5, 6, 7, 30, 8, 9, 10, 31]) == 0.0
    assert copied_share(prompt, [40, 5, 6, 7, 8, 41, 42, 43]) == 0.5


def test_source_prompts_hold_a_passage_and_how_it_begins(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    for topic in ("law", "sport"):
        (tmp_path / topic).mkdir()
        for number in range(2):
            text = f"The {topic} number {number} has a first sentence. " * 20
            (tmp_path / topic / f"{number}.txt").write_text(text)
    prompts = source_prompts(tokenizer, tmp_path, max_tokens=120, per_style=2)
    assert [p.style for p in prompts] == [Style.COQA] * 2 + [Style.SUMMARY] * 2
    texts = [str(tokenizer.decode(prompt.tokens)) for prompt in prompts]
    assert len(set(texts)) == 4
    assert all(text.endswith("number 0 has a") for text in texts[:2])
    assert all("first sentence.\n\nAnswer" in text for text in texts)


def test_the_long_prompt_has_exactly_the_length_asked_for(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert len(long_prompt(tokenizer, None, 300)) == 300
    assert len(long_prompt(tokenizer, None, 900)) == 900


def test_free_prompts_differ(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len({tuple(prompt.tokens) for prompt in free_prompts(tokenizer, 3)}) == 3


def _prompt_figures(style: Style, plain_s: float, speculative_s: float) -> PromptFigures:
    return PromptFigures(
        style=style,
        num_tokens=8,
        copied_share=0.5,
        plain_s=plain_s,
        speculative_s=speculative_s,
        tokens_per_trip=2.0,
        accepted_share=0.5,
        is_equal=True,
    )


@pytest.fixture
def link_figures() -> LinkFigures:
    return LinkFigures(
        compute_ms=1.0,
        link_ms=41.0,
        prompts=[
            _prompt_figures(Style.COQA, 4.0, 1.0),
            _prompt_figures(Style.SUMMARY, 2.0, 2.0),
            _prompt_figures(Style.FREE, 3.0, 3.0),
            _prompt_figures(Style.FREE, 3.0, 4.0),
        ],
        long_plain_s=4.0,
        long_speculative_s=2.0,
        long_uncached_s=20.0,
        long_copied_share=0.9,
        is_equal=True,
    )


def test_gains_are_of_all_seconds_and_free_text_s_is_the_least(link_figures: LinkFigures) -> None:
    assert link_figures.gain([Style.COQA, Style.SUMMARY]) == pytest.approx(2.0)
    assert link_figures.least_gain(Style.FREE) == pytest.approx(0.75)


def test_the_parts_of_the_mechanisms_make_up_the_whole(link_figures: LinkFigures) -> None:
    parts = mechanism_parts({"dense-s": 100.0, "lengths": 40.0}, link_figures)
    assert [part.factor for part in parts] == pytest.approx([2.5, 2.0, 5.0, 2.0])
    product = 1.0
    for part in parts:
        product *= part.factor
    assert product == pytest.approx(100.0 / 2.0)


def test_naive_lengths_run_from_the_prompt_to_the_token_before_the_last() -> None:
    lengths = timed_lengths(512, 128)
    assert (len(lengths), lengths[0], lengths[-1]) == (8, 512, 639)


def test_the_number_of_clients_is_an_argument_of_its_own() -> None:
    arguments, clients = _parse(["--profile", "smoke", "--clients", "3", "--threads", "1"])
    assert (arguments.profile, arguments.threads, clients) == ("smoke", (1,), 3)


def test_clients_decode_at_once_and_the_trunk_is_counted(tmp_path: Path) -> None:
    model = served_model("tiny", write_tiny_llama(tmp_path / "model"), 2)
    kits = make_kits(tmp_path / "kits", owner_names(2))
    case = ClientsCase(
        model=model, num_clients=2, prompt_length=6, new_tokens=12, repeats=1, server_threads=1
    )
    with Worlds(kits, num_shared=2) as worlds:
        figures = measure_clients(case, worlds)
        with worlds.open(model, 1) as world:
            prompt = [5, 6, 7] * 4
            plain, drafted = (
                world.run(
                    Job(streams=[StreamSpec(prompt=prompt, new_tokens=9)], draft=draft)
                ).streams[0]
                for draft in ("none", "lookup")
            )
            stepped = world.run(Job(steps=Steps(lengths=[4, 1, 1])))
            held = world.run_held(
                [Job(streams=[StreamSpec(prompt=prompt, new_tokens=9)], is_held=True)]
            )
    assert figures.is_greedy_equal
    assert 0.5 < figures.fairness <= 1
    assert figures.total_tokens_per_s > 0
    assert plain.tokens == drafted.tokens
    assert (plain.num_drafted, plain.num_round_trips) == (0, 9)
    assert len(stepped.step_seconds) == 3
    assert all(
        trunk_s <= whole_s
        for trunk_s, whole_s in zip(stepped.trunk_seconds, stepped.step_seconds, strict=True)
    )
    # The first token belongs to the prompt, which was read before the parent's `go`.
    assert held.trunk_tokens == 8
    assert held.trunk_tokens_per_s > 0
