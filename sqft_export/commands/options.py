"""Options that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sqft_export.artifacts.remote import runs_folder

RecipeFile = Annotated[
    Path,
    typer.Argument(help="recipe file, or a name that `list recipes` prints, such as tiny"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="recipe settings to replace, such as sparsify.sparsity=0.6"),
]
ModelPath = Annotated[
    Path | None, typer.Option(help="local Hugging Face folder, instead of the recipe's model")
]
Runs = Annotated[
    Path,
    typer.Option(
        parser=runs_folder,
        metavar="FOLDER",
        help="folder for all artifacts, or a URL such as s3://bucket/runs (extra s3)",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=4096,
        help="compute threads; default: OMP_NUM_THREADS, else the number of idle processors",
    ),
]
KernelsOption = Annotated[
    Literal["stock", "auto", "dense", "sparse"] | None,
    typer.Option(
        "--execution",
        help="kernels for OpenVINO and GGUF folders: stock: the runtime's; auto, dense, sparse: "
        "ours; default: those of a run's best deployment, else stock",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="print one JSON document on stdout and nothing else")
]
