"""Scores of one reply against the right answers: exact match, F1, ROUGE.

It does not run a model nor average. A new metric is a function under `@METRICS.register`; it takes
a reply and one or more references and gives 0 to 1.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from cutlayer.errors import ConfigError, DataError

__all__ = ["METRICS", "MetricRegistry", "TextMetric", "normalised"]

TextMetric = Callable[[str, Sequence[str]], float]
"""Reply and references -> 0 to 1."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class MetricRegistry:
    """Text metrics by name. Each entry makes its metric when it is first wanted."""

    def __init__(self) -> None:
        self._makers: dict[str, Callable[[], TextMetric]] = {}

    def register(self, name: str) -> Callable[[Callable[[], TextMetric]], Callable[[], TextMetric]]:
        """Decorator of a function without arguments that makes the metric."""

        def add(maker: Callable[[], TextMetric]) -> Callable[[], TextMetric]:
            assert name not in self._makers, f"metric {name} is registered twice"
            self._makers[name] = maker
            return maker

        return add

    @property
    def names(self) -> tuple[str, ...]:
        """Registered names, sorted."""
        return tuple(sorted(self._makers))

    def require(self, name: str) -> str:
        """The name itself.

        Raises:
            DataError: no metric has it; the nearest known one is named.
        """
        if name not in self._makers:
            near = difflib.get_close_matches(name, self.names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            known = ", ".join(self.names)
            raise DataError(f"metric {name!r} is unknown; {hint}known: {known}")
        return name

    def make(self, name: str) -> TextMetric:
        """The metric of that name.

        Raises:
            DataError: the name is unknown.
            ConfigError: it needs a package that is not installed.
        """
        return self._makers[self.require(name)]()


METRICS = MetricRegistry()


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and doubled spaces.

    Source: Rajpurkar et al., SQuAD (arXiv 1606.05250), `normalize_answer` of its official script;
        CoQA's is the same.
    """
    bare = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


@METRICS.register("exact_match")
def _exact_match() -> TextMetric:
    def score(reply: str, references: Sequence[str]) -> float:
        return float(normalised(reply) in {normalised(reference) for reference in references})

    return score


@METRICS.register("f1")
def _f1() -> TextMetric:
    def score(reply: str, references: Sequence[str]) -> float:
        return max(_word_f1(reply, reference) for reference in references)

    return score


@METRICS.register("rouge_1")
def _rouge_1() -> TextMetric:
    return _rouge("rouge1")


@METRICS.register("rouge_2")
def _rouge_2() -> TextMetric:
    return _rouge("rouge2")


@METRICS.register("rouge_l")
def _rouge_l() -> TextMetric:
    return _rouge("rougeL")


def _rouge(kind: str) -> TextMetric:
    """F-measure of common words, word pairs, or of the longest common subsequence; no stemming.

    Source: Lin, ROUGE (2004), sections 2 and 3.1, as the package rouge-score computes them.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(
            "the ROUGE metrics need the package rouge-score; "
            'install it: pip install "cutlayer[evaluation]"'
        ) from error
    scorer = RougeScorer([kind], use_stemmer=False)

    def score(reply: str, references: Sequence[str]) -> float:
        return float(scorer.score_multi(list(references), reply)[kind].fmeasure)

    return score


def _word_f1(reply: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words of both, counted with repetition.

    Source: SQuAD's official script, `compute_f1` of version 2: no words equal no words alone.
    """
    got, wanted = normalised(reply).split(), normalised(reference).split()
    if not got or not wanted:
        return float(got == wanted)
    num_common = sum((Counter(got) & Counter(wanted)).values())
    return 2 * num_common / (len(got) + len(wanted))
