"""Retrieval on held-out pairs as an evaluator inside pretraining."""

from __future__ import annotations

from collections.abc import Sequence

from pairstream.recipe import load_recipe
from pretrain.encoder import Encoder
from retrieval.checks import checked_cutoffs
from retrieval.diagnostics import diagnostics
from retrieval.embed import embed_shards
from retrieval.metrics import retrieval_metrics
from retrieval.recipe import ClassificationTask, SuiteRecipe
from retrieval.share import Share


class RetrievalEvaluator:
    """Recall, ranks and the embeddings' shape; a recipe names it `retrieval.evaluator:RetrievalEvaluator`.

    The encoder keeps its weights, each module its training mode, and no global random state is touched, so
    a run with evaluations trains as one without. Several processes share the work, and all get its numbers.

    Args:
        shards: The held-out pairs.
        limit: Only the first so many samples. Recall over fewer is higher: never compare across limits.
        batch_size: Pictures at a time.
        workers: Loader processes.
        ks: Cut-offs.
        max_faults: Share of bad samples past which it stops.

    Raises:
        ValueError: A cut-off or limit below 1.

    Example:
        >>> RetrievalEvaluator("shards/dev", limit=500).run(encoder)["text_to_image/recall@1"]  # doctest: +SKIP
    """

    over_ranks = True

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        limit: int | None = None,
        batch_size: int = 64,
        workers: int = 0,
        ks: Sequence[int] = (1, 5, 10),
        max_faults: float = 0.01,
    ):
        self.shards, self.limit, self.batch_size = shards, limit, batch_size
        self.workers, self.ks, self.max_faults = workers, checked_cutoffs(ks), max_faults
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 sample, got {limit}")

    def run(self, encoder: Encoder) -> dict[str, float]:
        """Measure.

        Returns:
            `image_to_text/recall@1`, ..., `text_to_image/mean_rank`, and with two pairs or more the shape of both
            spaces: `diagnostics/alignment`, ... (see `retrieval.diagnostics`).
        """
        share = Share.of_processes()
        found = embed_shards(
            encoder,
            self.shards,
            batch_size=self.batch_size,
            limit=self.limit,
            workers=self.workers,
            max_faults=self.max_faults,
            share=share,
        )
        metrics = retrieval_metrics(
            found.images, found.texts, found.image_of_text, self.ks, over_ranks=share.world > 1
        )
        numbers = {
            f"{direction}/{name}": value
            for direction, ranked in metrics.items()
            for name, value in ranked.items()
            if name.startswith(("recall", "median", "mean"))
        }
        if min(len(found.images), len(found.texts)) < 2:
            return numbers
        shape = diagnostics(found.images, found.texts, found.image_of_text)
        return numbers | {f"diagnostics/{name}": value for name, value in shape.items()}


class ClassificationEvaluator:
    """Zero-shot accuracy on labelled pictures; a recipe names it `retrieval.evaluator:ClassificationEvaluator`.

    Give it twice for the target set and a shifted one, with a `name` each. Several processes share the work, and all
    get its numbers.

    Args:
        data: A folder of class folders, or shards with labels.
        classes: imagenet, cifar10, cifar100 or a file; the folders' names when None.
        templates: imagenet, simple, cifar, plain or a file.
        name: Put in front of the numbers.
        limit: Only so many pictures: spread evenly over class folders, the first of shards.
        batch_size: Pictures at a time.
        workers: Loader processes.
        max_faults: Share of bad pictures past which it stops.

    Raises:
        ValueError: A number out of range.

    Example:
        >>> ClassificationEvaluator("sets/pets", templates="simple").run(encoder)       # doctest: +SKIP
        {'classification/acc1': 0.89, 'classification/acc5': 0.99, 'classification/mean_per_class_recall': 0.88}
    """

    over_ranks = True

    def __init__(
        self,
        data: str | list[str],
        *,
        classes: str | None = None,
        templates: str = "plain",
        name: str = "classification",
        limit: int | None = None,
        batch_size: int = 64,
        workers: int = 0,
        max_faults: float = 0.01,
    ):
        task = ClassificationTask(name=name, data=data, classes=classes, templates=templates, limit=limit)
        self.task = task
        settings = {"batch_size": batch_size, "workers": workers, "max_faults": max_faults}
        self.recipe = SuiteRecipe.model_validate({"out": "", "tasks": [task], **settings})

    def run(self, encoder: Encoder) -> dict[str, float]:
        """Measure.

        Returns:
            `NAME/acc1` and its like.
        """
        from retrieval.suite import headline, run_task

        metrics = run_task(encoder, self.task, self.recipe, share=Share.of_processes()).metrics
        return {
            f"{self.task.name}/{name.replace(' ', '_')}": value for name, value in headline(metrics).items()
        }


class SuiteEvaluator:
    """A suite in its quick form inside pretraining; a recipe names it `retrieval.evaluator:SuiteEvaluator`.

    Nothing is cached: the weights change from one time to the next. Several processes share the work, and all get
    its numbers.

    Args:
        recipe: A suite's YAML file.
        quick: Only some samples of each task (`quick_limit` of the recipe).

    Raises:
        FileNotFoundError: No such recipe.
        ValueError: A recipe that is not valid.
    """

    over_ranks = True

    def __init__(self, recipe: str, *, quick: bool = True):
        self.recipe, self.quick = load_recipe(SuiteRecipe, "retrieval", recipe), quick

    def run(self, encoder: Encoder) -> dict[str, float]:
        """Measure.

        Returns:
            `TASK/NUMBER` for the headline numbers of each task.
        """
        from retrieval.suite import headline, run_task

        share = Share.of_processes()
        return {
            f"{task.name}/{name.replace(' ', '_')}": value
            for task in self.recipe.tasks
            for name, value in headline(
                run_task(encoder, task, self.recipe, quick=self.quick, share=share).metrics
            ).items()
        }
