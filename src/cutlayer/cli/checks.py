"""What `doctor` looks at, for each side: every problem is a finding, none an exception.

It does not print. It opens no run and loads no weights; the handshake is the one that work begins
with, so what it accepts is what training will find.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

import psutil

from cutlayer.cli.link import check_evidence, check_listening, check_reachable
from cutlayer.client.hops import hop_views
from cutlayer.client.settings import ClientSettings, ModelSettings
from cutlayer.data.settings import DataSettings
from cutlayer.data.sources import read_records
from cutlayer.errors import CutlayerError
from cutlayer.identity.certificates import days_left, expiry_warning, load_certificates
from cutlayer.identity.check import check_kit
from cutlayer.model.checkpoint import DTYPES, check_dtype
from cutlayer.model.folder import HubFolder, ModelFolder, resolve_model
from cutlayer.model.manifest import names_by_leaf
from cutlayer.model.part_settings import TrunkWeights
from cutlayer.model.partition import Cut, Part
from cutlayer.model.quantised import bits_of, require_library
from cutlayer.server.settings import ServerSettings, TrunkSettings
from cutlayer.tee.private_model.label import is_sealed
from cutlayer.wire.endpoints import TlsFiles, read_tls

__all__ = ["Finding", "Status", "check_client", "check_server"]

_GIB = 1 << 30
_LOW_DISK_BYTES = 2 * _GIB
_ROOM = 1.3
"""Weights are not all: activations, caches and optimizer need room too."""


class Status(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check."""

    name: str
    status: Status
    text: str
    """What, where and, unless it is in order, what to do."""


def check_client(settings: ClientSettings) -> list[Finding]:
    """Every check of a data owner's settings, in the order in which work would meet them."""
    found = list(_settings_read())
    found += _certificates(settings.connection.tls)
    found += _folder("run folder", settings.run.folder)
    if settings.run.key_file is not None:
        found += _private_file("storage key", settings.run.key_file)
    if settings.data is not None:
        found += _data(settings.data)
    model = settings.model
    found += _dtype(model.dtype, model.device)
    folder = _tried(found, "model", lambda: resolve_model(model.path, model.revision))
    if folder is None:
        return found
    found += _model(folder, model, (Part.HEAD, Part.TAIL))
    if not any(f.name == "cut" and f.status is Status.FAIL for f in found):
        views = hop_views(settings)
        for number, view in enumerate(views, start=1):
            name = "server" if len(views) == 1 else f"hop {number}"
            found += _link(name, partial(check_reachable, view, folder))
    return found


def check_server(settings: ServerSettings) -> list[Finding]:
    """Every check of a trunk server's settings."""
    found = list(_settings_read())
    found += _certificates(settings.listen.tls)
    if settings.revoked is None and settings.listen.tls is not None:
        text = "no revocation list (revoked): revoked certificates stay accepted"
        found.append(Finding(name="revocation", status=Status.WARN, text=text))
    elif settings.revoked is not None:
        found += _file("revocation", settings.revoked)
    found += _folder("state folder", settings.state.folder)
    if settings.state.key_file is not None:
        found += _private_file("storage key", settings.state.key_file)
    tee = settings.tee
    if tee is not None:
        found += _link("attestation", lambda: check_evidence(tee))
    model = settings.model
    found += _dtype(model.dtype, model.device)
    if model.trunk_weights is not TrunkWeights.FULL:
        found += _link("weights", lambda: _library_for(model.trunk_weights))
    if is_sealed(model.path):
        text = f"{model.path} is sealed; its owner's key comes when the server starts"
        found.append(Finding(name="model", status=Status.WARN, text=text))
    elif folder := _tried(found, "model", lambda: resolve_model(model.path, model.revision)):
        found += _model(folder, model, (Part.TRUNK,))
    found += _link("address", lambda: check_listening(settings.listen))
    return found


def _settings_read() -> Iterator[Finding]:
    # Wrong settings never come this far: `load_settings` has named the key.
    yield Finding(name="settings", status=Status.OK, text="every key is known and in range")


def _tried(
    found: list[Finding], name: str, action: Callable[[], ModelFolder]
) -> ModelFolder | None:
    try:
        return action()
    except CutlayerError as error:
        found.append(Finding(name=name, status=Status.FAIL, text=str(error)))
        return None


def _link(name: str, look: Callable[[], str]) -> Iterator[Finding]:
    try:
        yield Finding(name=name, status=Status.OK, text=look())
    except CutlayerError as error:
        yield Finding(name=name, status=Status.FAIL, text=f"{type(error).__name__}: {error}")


def _certificates(tls: TlsFiles | None) -> Iterator[Finding]:
    name = "certificates"
    if tls is None:
        yield Finding(name=name, status=Status.WARN, text="plaintext: loopback only, no identity")
        return
    found: list[Finding] = []
    if (tls.certificate.parent / "member.json").exists():
        found += [
            Finding(name=name, status=Status.FAIL if f.is_error else Status.WARN, text=f.text)
            for f in check_kit(tls.certificate.parent)
        ]
    found += _tls_files(tls)
    yield from found


def _tls_files(tls: TlsFiles) -> Iterator[Finding]:
    name = "certificates"
    try:
        read_tls(tls)
        certificate = load_certificates(tls.certificate)[0]
    except CutlayerError as error:
        yield Finding(name=name, status=Status.FAIL, text=str(error))
        return
    yield from _private_file("private key", tls.key)
    days, warning = days_left(certificate), expiry_warning(certificate, str(tls.certificate))
    if warning is None:
        end = certificate.not_valid_after_utc.date().isoformat()
        text = f"{tls.certificate}: {certificate.subject.rfc4514_string()} until {end}"
        yield Finding(name=name, status=Status.OK, text=text)
    else:
        yield Finding(name=name, status=Status.WARN if days > 0 else Status.FAIL, text=warning)


def _file(name: str, path: Path) -> Iterator[Finding]:
    if path.is_file():
        yield Finding(name=name, status=Status.OK, text=str(path))
    else:
        yield Finding(name=name, status=Status.FAIL, text=f"{path} is missing; check the path")


def _private_file(name: str, path: Path) -> Iterator[Finding]:
    if not path.is_file():
        yield from _file(name, path)
    elif path.stat().st_mode & 0o077:
        text = f"{path} is open to other users; run `chmod 600 {path}`"
        yield Finding(name=name, status=Status.FAIL, text=text)
    else:
        yield Finding(name=name, status=Status.OK, text=f"{path} is readable by its owner alone")


def _folder(name: str, folder: Path) -> Iterator[Finding]:
    """Mode of a private folder, and the free disk under it or where it will be."""
    if folder.exists() and (not folder.is_dir() or folder.stat().st_mode & 0o077):
        text = f"{folder} is open to other users or no folder; run `chmod 700 {folder}`"
        yield Finding(name=name, status=Status.FAIL, text=text)
        return
    state = "private" if folder.exists() else "will be made"
    yield Finding(name=name, status=Status.OK, text=f"{folder}: {state}")
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    status = Status.OK if free >= _LOW_DISK_BYTES else Status.WARN
    yield Finding(name="disk", status=status, text=f"{free / _GIB:.1f} GiB free at {there}")


def _data(data: DataSettings) -> Iterator[Finding]:
    for split, path in (("train", data.train), ("validation", data.validation)):
        if path is None:
            continue
        try:
            next(iter(read_records(path, data.kind, split)))
        except CutlayerError as error:
            yield Finding(name=f"data.{split}", status=Status.FAIL, text=str(error))
        else:
            text = f"{path}: the first record is readable"
            yield Finding(name=f"data.{split}", status=Status.OK, text=text)


def _dtype(dtype: str, device: str) -> Iterator[Finding]:
    try:
        warning = check_dtype(dtype, device)
    except CutlayerError as error:
        yield Finding(name="dtype", status=Status.FAIL, text=str(error))
        return
    status = Status.OK if warning is None else Status.WARN
    yield Finding(name="dtype", status=status, text=warning or f"{dtype} on {device}")


def _library_for(weights: TrunkWeights) -> str:
    require_library()
    return f"{weights}: bitsandbytes is installed"


def _model(
    folder: ModelFolder, settings: ModelSettings | TrunkSettings, parts: tuple[Part, ...]
) -> Iterator[Finding]:
    try:
        config = folder.config
        cut = Cut(settings.lower, settings.upper)
        cut.check(config.num_hidden_layers)
    except CutlayerError as error:
        yield Finding(name="cut", status=Status.FAIL, text=str(error))
        return
    text = f"{config.model_type} with {config.num_hidden_layers} blocks at {folder.path}"
    yield Finding(name="model", status=Status.OK, text=text)
    if isinstance(folder, HubFolder):
        text = "hub model: sizes are known when its parts are downloaded"
        yield Finding(name="memory", status=Status.WARN, text=text)
    elif settings.dtype in DTYPES:
        weights = TrunkWeights.FULL if Part.HEAD in parts else settings.trunk_weights
        yield _memory(folder, cut, parts, bits_of(DTYPES[settings.dtype], weights))


def _memory(folder: ModelFolder, cut: Cut, parts: tuple[Part, ...], bits: float) -> Finding:
    try:
        needed = _num_weights(folder, cut, parts) * bits / 8
    except CutlayerError as error:
        return Finding(name="memory", status=Status.FAIL, text=str(error))
    free = psutil.virtual_memory().available
    text = (
        f"{' and '.join(parts)}: {needed / _GIB:.2f} GiB of weights, {free / _GIB:.1f} GiB of "
        "memory available"
    )
    if needed > free:
        return Finding(name="memory", status=Status.FAIL, text=f"{text}; choose another cut")
    status = Status.OK if needed * _ROOM <= free else Status.WARN
    return Finding(name="memory", status=status, text=text)


def _num_weights(folder: ModelFolder, cut: Cut, parts: tuple[Part, ...]) -> int:
    """Values that the parts hold in memory; a tied embedding counts once."""
    num_blocks = folder.config.num_hidden_layers
    leaves = {f"block.{index}" for part in parts for index in cut.blocks(part, num_blocks)}
    if Part.HEAD in parts:
        leaves |= {"embedding", "norm", "lm_head"}
    layout = folder.layout()
    groups = names_by_leaf(folder.names(), num_blocks)
    return sum(layout[name].numel() for leaf in leaves for name in groups.get(leaf, ()))
