"""Brings together what was measured, what is given and what is only a default, each with its name.

It measures nothing itself and predicts nothing.
"""

from dataclasses import dataclass

from cutlayer.client.settings import ClientSettings
from cutlayer.data.load import load_dataset
from cutlayer.data.template import RowLimits
from cutlayer.errors import ConfigError
from cutlayer.model.folder import ModelFolder
from cutlayer.planner.measurements import BlockSpeed, EndsSpeed, LinkSpeed, Measured, Measurements
from cutlayer.planner.workload import Workload

__all__ = ["DEFAULT_LINK", "Given", "SideSeconds", "parse_blocks", "with_given", "workload_of"]

DEFAULT_LINK = LinkSpeed(rtt_s=0.04, mbit_per_s=100.0)
"""A wide-area link; stands in where none was measured or given, and is named as a default."""
_FORWARD_SHARE = 0.45
"""Of a block's training, where the weights are frozen and no measurement says."""
_GIVEN = "given"


@dataclass(frozen=True, kw_only=True)
class SideSeconds:
    """Seconds of one block on one side, as a user gives them; None leaves what was measured."""

    train_s: float | None = None
    """Per 1,000 tokens, forward and backward."""
    prefill_s: float | None = None
    """Per 1,000 tokens."""
    decode_s: float | None = None
    """Per token of every stream."""

    @property
    def is_given(self) -> bool:
        """Whether any of them is."""
        return (self.train_s, self.prefill_s, self.decode_s) != (None, None, None)


@dataclass(frozen=True, kw_only=True)
class Given:
    """Numbers that a user gives; None leaves what was measured."""

    client: SideSeconds = SideSeconds()
    server: SideSeconds = SideSeconds()
    client_memory_gb: float | None = None
    server_memory_gb: float | None = None
    baseline_memory_gb: float | None = None
    rtt_ms: float | None = None
    mbit_per_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not 0 <= value < float("inf"):
                option = "--" + name.removesuffix("_gb").replace("_", "-")
                raise ConfigError(f"{option} {value} is no size, rate or time; give 0 or more")
        for side in (self.client, self.server):
            for name, value in vars(side).items():
                if value is not None and not 0 <= value < float("inf"):
                    raise ConfigError(f"{name}={value} is no time of a block; give 0 or more")
        if self.mbit_per_s == 0:
            raise ConfigError("--mbit-per-s 0 carries nothing; give the link's rate")


def with_given(measured: Measurements, given: Given) -> Measurements:
    """The measurements with what is given in their place; a link that nobody knows is the default.

    Raises:
        ConfigError: the memory of an empty process is neither measured nor given.
    """
    changes: dict[str, object] = {}
    if given.client.is_given:
        client = _given_speed(measured.client, given.client)
        changes |= {"client": client, "client_source": _GIVEN}
        changes |= _scaled_ends(measured, client)
    if given.server.is_given:
        server = _given_speed(measured.server, given.server)
        changes |= {"server": server, "server_source": _GIVEN}
    for name in ("client_memory", "server_memory", "baseline_memory"):
        size_gb = getattr(given, f"{name}_gb")
        if size_gb is not None:
            field = name.removesuffix("_memory") if name == "baseline_memory" else name
            changes[field] = Measured(num_bytes=round(size_gb * 1e9), source=_GIVEN)
    changes |= _link(measured, given)
    return measured.model_copy(update=changes)


def parse_blocks(text: str | None, num_blocks: int) -> range:
    """Blocks that a server holds, from "LOWER:UPPER"; None is all.

    Raises:
        ConfigError: it is no such range.
    """
    if text is None:
        return range(num_blocks)
    lower, colon, upper = text.partition(":")
    if not (colon and lower.strip().isdecimal() and upper.strip().isdecimal()):
        raise ConfigError(f"--server-blocks {text!r} is not of the form LOWER:UPPER, such as 2:28")
    return range(int(lower), int(upper))


def workload_of(settings: ClientSettings, folder: ModelFolder) -> tuple[Workload, str]:
    """What a client's settings make of a workload, its rows counted where they are there.

    Args:
        settings: of the client.
        folder: the model's, for its tokenizer.

    Returns:
        The workload, and where the numbers of its rows come from.
    """
    train, generation = settings.train, settings.generation
    table: dict[str, object] = {
        "codec": settings.connection.codec,
        "dtype": settings.model.dtype,
        "threads": settings.model.threads,
        "decode_threads": settings.model.decode_threads,
        "adapter": settings.adapter,
        "prefill_tokens": generation.prefill_tokens,
        "new_tokens": settings.sampling.max_new_tokens,
    }
    if train is not None:
        table |= {
            "epochs": train.epochs or 1,
            "rows_per_step": train.rows_per_step,
            "micro_batch_rows": train.micro_batch_rows,
            "in_flight": train.in_flight,
        }
    rows, source = _rows(settings, folder)
    return Workload.model_validate({**table, **rows}), source


def _rows(settings: ClientSettings, folder: ModelFolder) -> tuple[dict[str, object], str]:
    data, config = settings.data, folder.config
    if data is None or not data.train.exists():
        return {}, "default"
    limits = RowLimits(
        context_length=int(config.max_position_embeddings), vocab_size=config.vocab_size
    )
    found = load_dataset(data, folder.tokenizer(), limits, settings.privacy.keep_share)
    if not found.train:
        return {}, "default"
    lengths = [len(example.tokens) for example in found.train]
    scored = sum(sum(label != -100 for label in example.labels) for example in found.train)
    return {
        "rows": len(lengths),
        "mean_length": max(2, round(sum(lengths) / len(lengths))),
        "max_length": max(2, *lengths),
        "scored_share": max(1, scored) / sum(lengths),
    }, f"counted in {data.train}"


def _given_speed(known: BlockSpeed, given: SideSeconds) -> BlockSpeed:
    changes: dict[str, object] = {}
    if given.train_s is not None:
        share = _FORWARD_SHARE
        if known.forward_s and known.backward_s:
            share = known.forward_s / (known.forward_s + known.backward_s)
        changes["forward_s"] = share * given.train_s
        changes["backward_s"] = (1 - share) * given.train_s
    if given.prefill_s is not None:
        changes["prefill_s"] = given.prefill_s
    if given.decode_s is not None:
        changes["decode_s"] = given.decode_s
    return known.model_copy(update=changes)


def _scaled_ends(measured: Measurements, client: BlockSpeed) -> dict[str, object]:
    """Another client's ends: as much faster or slower as its blocks are."""
    if measured.ends is None:
        return {}
    old, ends = measured.client, measured.ends
    train = _ratio(client.forward_s, old.forward_s)
    scaled = EndsSpeed(
        head_s=ends.head_s * train,
        tail_s=ends.tail_s * train,
        prefill_s=ends.prefill_s * _ratio(client.prefill_s, old.prefill_s),
        decode_s=ends.decode_s * _ratio(client.decode_s, old.decode_s),
    )
    return {"ends": scaled, "ends_source": "derived: measured here, scaled as the given blocks are"}


def _ratio(new: float | None, old: float | None) -> float:
    return new / old if new is not None and old else 1.0


def _link(measured: Measurements, given: Given) -> dict[str, object]:
    if given.rtt_ms is None and given.mbit_per_s is None:
        if measured.link is not None:
            return {}
        return {"link": DEFAULT_LINK, "link_source": "default; give --rtt-ms and --mbit-per-s"}
    known = measured.link or DEFAULT_LINK
    rest = "" if measured.link is not None else ", the rest default"
    rest = rest if None in (given.rtt_ms, given.mbit_per_s) else ""
    link = LinkSpeed(
        rtt_s=known.rtt_s if given.rtt_ms is None else given.rtt_ms / 1000,
        mbit_per_s=known.mbit_per_s if given.mbit_per_s is None else given.mbit_per_s,
    )
    return {"link": link, "link_source": _GIVEN + rest}
