"""The deployments in the artifact of a pass ``peers-<kind>``, and paired tests against them."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from sqft_export.data.scoring import Judged
from sqft_export.measure.results import Runtime
from sqft_export.measure.rows import TITLES, DeploymentFolder
from sqft_export.measure.statistics import mcnemar
from sqft_export.recipe.peers import PEERS
from sqft_export.targets.folder import runtime_of

PEER_STAGES = tuple(dict.fromkeys(peer.stage for peer in PEERS.values()))


def peers_in(artifact: Path) -> list[DeploymentFolder]:
    """Return the deployments of an artifact in the order of ``PEERS``."""
    return [
        DeploymentFolder(
            folder.name, f"{peer.title}, {TITLES[cast(Runtime, runtime_of(folder))]}", folder
        )
        for name, peer in PEERS.items()
        for folder in sorted(artifact.glob(f"{name}*"))
        if folder.name == name or folder.name.removeprefix(f"{name}-") in TITLES
    ]


def peer_p_values(right: list[bool], judged: Mapping[str, list[Judged]]) -> dict[str, float]:
    """Return row id of every measured peer -> p-value of McNemar's test against it.

    :param right: whether a row answered each item right; empty for plain text.
    :param judged: row id -> judged answers to the same items.
    """
    if not right:
        return {}
    return {
        id: mcnemar(right, [answer.right for answer in answers])
        for id, answers in judged.items()
        if id.startswith(tuple(PEERS))
    }
