"""k-NN of a network while it trains."""

import copy
import logging

import numpy as np

from bincomm.config import PretrainConfig
from bincomm.data.sources import Mix, Source
from bincomm.distributed.ranks import Ranks
from bincomm.evaluation.evaluate import NoUsableImagesError, evaluate, figure
from bincomm.evaluation.pretrained import Pretrained
from bincomm.networks import Network

logger = logging.getLogger(__name__)

GALLERY, QUERIES = 5000, 1000  # images, at most


class ProgressEvaluation:
    """k-NN accuracies, k = 20, of features and codes, on a part of the labeled images.

    Args:
        gallery, queries: labeled sources; every so many images are taken of those that are larger.
    """

    def __init__(self, gallery: Source, queries: Source, config: PretrainConfig, ranks: Ranks):
        self.gallery, self.queries = spread(gallery, GALLERY), spread(queries, QUERIES)
        self.config, self.ranks = config, ranks

    def __call__(self, teacher: Network) -> dict[str, float]:
        """{"knn", "knn_codes"} of a network, which stays as it is, on rank 0; all ranks call. {} where no
        image can be used."""
        # Evaluation changes the mode and the layout of its network.
        model = Pretrained.of(copy.deepcopy(teacher), self.config, self.ranks.device)
        try:
            result = evaluate(
                model,
                self.gallery,
                self.queries,
                ("knn", "knn_codes"),
                ranks=self.ranks,
                cache=False,
                report_unusable=(),
            )
        except NoUsableImagesError as error:
            logger.warning("evaluate_every: no k-NN: %s", error)
            return {}
        return {name: figure(result, name, "20") for name in ("knn", "knn_codes") if result}


def spread(source: Source, most: int) -> Source:
    """A source with at most so many of its images, evenly from all of it, and of a mix from every part."""
    count = len(source.images)
    if count <= most:
        return source
    if isinstance(source.images, Mix):
        parts = [Source(part) for part in source.images.parts]
        return Source(Mix([spread(part, max(1, most * len(part.images) // count)).images for part in parts]))
    return source.select(np.linspace(0, count - 1, most).astype(int).tolist())
