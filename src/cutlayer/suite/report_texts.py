"""What the report says in words, whatever the numbers are. It reads no result."""

from cutlayer.model.optimizer import AdamWSettings
from cutlayer.suite.compare import NEAR_TIE_NATS
from cutlayer.suite.recipe import ALPHA, CLIP_NORM, MAX_LENGTH, RANK

__all__ = ["AGAIN", "DIFFERENCES", "INTRODUCTION", "OFFICIAL_SCORES", "method_text"]

INTRODUCTION = """\
The published claim is that a split, federated LLaMA reaches a performance comparable with
centralised training on language understanding, summarisation and conversational questions. This
page measures that claim for cutlayer: the same model, rows, order and hyper-parameters, trained
once unsplit by `transformers` and `peft` alone and once through the split, with codecs, noise and
several owners, and scored on the same questions.

`cutlayer eval report` writes this page from a folder of results; change neither by hand.
"""

OFFICIAL_SCORES = """\
That loaders and metrics give the scores of the official scripts is no matter of these runs:
`python -m benchmarks.official_scores` runs the scripts beside ours, and
`tests/unit/benchmarks/test_official_scores.py` holds the recorded numbers.
"""

DIFFERENCES = """\
The published systems are FL-LLaMA / FedSEA-LLaMA (arXiv 2505.15683) and its forerunner (Huang et
al., arXiv 2401.09796). Scores here are not to be put beside theirs, for these reasons:

* **Model.** Theirs has 7 billion parameters and 32 blocks in float16; the model named above each
  table here is what a machine without an accelerator trains. A small model learns less from a few
  rows, and rounding or noise that a large one tolerates may hurt it more, or the other way round.
* **Data.** Theirs are the public training and test sets. Packaged rows here are what installs from
  a package registry: parts of test sets and other real texts, split by us
  ([published-tasks.md](published-tasks.md)), a few dozen to a few hundred rows. The `full` profile
  takes the original files.
* **Noise in training and at inference.** They add noise to what the head sends, in training only:
  the deployed model, and every text it reads then, goes without. Here noise is on in both: the
  score of a noised row of a table includes what the noise costs when the model is used.
* **Size of the noise.** Their scale n is the mean of |noise|, a standard deviation of 1.2533 n,
  without a clip and without an account of privacy; `gaussian` is that one. The other mechanisms
  clip and account, so their scales mean something else: compare scores at equal guarantees
  ([privacy.md](privacy.md)), never at equal scales.
* **Gradients.** What the client sends back at the upper cut leaks labels. Like theirs, the runs
  here leave it as it is, so that noise in a table is the noise on activations alone; `cutlayer` has
  mechanisms for it too.
* **Mask handling.** Their client sends one number per row, how many tokens are real, in place of a
  dense mask, yet the released code still carries dense masks at the start of a generation and
  forgets the padding after the first decoded token, so batched replies there are not those of the
  model alone. Here rows are packed without padding, so that there is no mask to send, and batched
  replies equal single ones.
* **Codecs.** They send the model's own float16 and have no rounding beyond it; bf16, fp8 and int8
  rows have no published counterpart.
* **Federation.** Their released aggregation does not run, and at most two clients do. Rows of
  several owners here are real federations of four, with evenly shared and with skewed labels.
* **Leakage.** Their attack decoder is trained on targets that are shifted by one, which
  under-states what an observer recovers. Recovery here is from cutlayer's own audit
  ([attacks.md](attacks.md)), so a lower number there is not a safer cut.
"""

AGAIN = """\
```sh
cutlayer assets fetch evaluation
cutlayer eval suite --profile small --out build/evaluation
cutlayer eval report build/evaluation --out docs/evaluation.md
```

`make evaluate` does the first two and puts the page beside the results. A suite that was stopped
goes on where it was: runs that have ended well are kept, failed ones are tried again. Every
number comes from one of the runs below; `--only` with a run's name makes it alone.
"""


def method_text() -> str:
    """Recipe, seeds and statistics, with their sources."""
    optimizer = AdamWSettings()
    return f"""\
* **What is trained.** LoRA (Hu et al., 2021) of rank {RANK} and alpha {ALPHA:g} on all linear
  layers of the blocks, of head, trunk and tail alike, unless a row names another kind of adapter.
  AdamW (Loshchilov and Hutter, 2019) with beta {optimizer.beta1:g} and {optimizer.beta2:g},
  epsilon {optimizer.eps:g}, weight decay {optimizer.weight_decay:g} and a constant learning rate;
  gradients clipped to norm {CLIP_NORM:g}; rows of at most {MAX_LENGTH:,} tokens. The loss is the
  mean over the tokens of the answer.
* **Centralised** is a script of its own that imports `torch`, `transformers` and `peft` and nothing
  of cutlayer. It starts from the same adapter and sees the same rows in the same order. **Untuned**
  is the same script without a step. **Split** is one owner with p blocks in the head and q in the
  tail (2 and 2 unless said) and a trunk server, over encoded frames. **4 owners** share the same
  rows out, evenly at random (IID) or by a Dirichlet distribution over labels (label-skewed; the
  number is its concentration, smaller is more skewed), and take as many optimizer steps together.
  Each owner orders its own rows, so that other rows share a step than where one place has them all.
  **Centralised, in the order of 4 owners** is the unsplit script on the rows that meet in each step
  of these owners: what they are compared with, so that the federation alone is measured. Its own
  distance to centralised is what another order of the rows does, which no interval here contains.
* **Seeds.** A seed decides training rows, their order, the first adapter and who owns what. Test
  questions are the same for all seeds. Rows with one seed say nothing about other seeds. Noise has
  no seed: it comes from the operating system, so that a noised run never repeats to the digit.
* **Scores** are the official ones of each task: F1 and exact match with CoQA's normalisation (Reddy
  et al., 2019), ROUGE (Lin, 2004), accuracy, F1 over all options and exact match of MultiRC
  (Khashabi et al., 2018) as in SuperGLUE (Wang et al., 2019). Points are hundredths. The
  column under the metric's name is the one that runs are compared by.
* **Intervals** are 95 % percentile bootstrap intervals over questions (Efron, 1979): 1,000
  resamples with a fixed seed, so the same results give the same intervals. Of each question the
  mean over seeds is taken first. Seeds are not resampled, so an interval does not say how another
  training seed would come out: the column "by seed" does, for as many as there are. Turns of one
  CoQA story and options of one MultiRC question are resampled together where a result says which
  they are. Where it does not (results made before they did), and where questions share a passage,
  they count as independent, which makes intervals too narrow.
* **Against centralised** is the paired difference in points on the same questions and seeds: of
  each question, its score minus that of the centralised run, so that questions that both get wrong
  add no spread (Koehn, 2004). Runs on other questions are refused, not compared.
* **Near ties.** Two choices whose log-likelihoods differ by less than {NEAR_TIE_NATS:g} nats may
  change places by the order of a sum alone.
* **Seconds** are of the machine named at the end, which may have done other things. **MB** are
  bytes of training at the channel, all owners together. **Tokens** are those trained on.
"""
