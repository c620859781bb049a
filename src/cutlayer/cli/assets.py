"""`cutlayer assets`: models and corpora to try with, and a model's manifest."""

from pathlib import Path
from typing import Annotated

import typer

from cutlayer.cli.options import JsonOption
from cutlayer.cli.output import Output

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Fetch models and corpora; write model manifests.")

CacheOption = Annotated[
    Path | None,
    typer.Option("--cache", metavar="FOLDER", help="Instead of $CUTLAYER_CACHE or ~/.cache."),
]
ArchiveOption = Annotated[
    Path | None,
    typer.Option("--archive", metavar="FILE", help="The archive, downloaded by hand."),
]


@app.command("list")
def list_(cache: CacheOption = None, as_json: JsonOption = False) -> None:
    """What can be fetched, under what terms, and what is in the cache."""
    from cutlayer.data.assets import ASSETS, is_cached

    out = Output(as_json)
    found = [
        {
            "name": asset.name,
            "cached": is_cached(asset.name, cache),
            "licence": asset.licence,
            "about": asset.about,
        }
        for asset in ASSETS.values()
    ]
    rows = [
        (str(a["name"]), "yes" if a["cached"] else "no", str(a["licence"]), str(a["about"]))
        for a in found
    ]
    out.table(("name", "cached", "terms", "what"), rows)
    out.result({"assets": found})


@app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="See `cutlayer assets list`.")],
    cache: CacheOption = None,
    archive: ArchiveOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch one asset, unless a sound copy is in the cache; checked by SHA-256."""
    from cutlayer.data import assets

    out = Output(as_json)
    path = assets.fetch(name, cache, archive)
    out.say(str(path))
    out.result({"name": name, "path": str(path)})


@app.command("manifest")
def manifest(
    folder: Annotated[Path, typer.Argument(help="A local model folder.")],
    as_json: JsonOption = False,
) -> None:
    """Hash a whole model, write its manifest, print the digest to pin in `model.digest`."""
    from cutlayer.model.folder import ModelFolder
    from cutlayer.model.manifest import manifest_of, write_manifest

    out = Output(as_json)
    found = manifest_of(ModelFolder(folder))
    path = write_manifest(found, folder)
    out.say(f"{path}\nmodel digest {found.root()}")
    out.result({"path": str(path), "digest": found.root(), "num_leaves": len(found.leaves)})
