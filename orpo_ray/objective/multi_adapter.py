"""A micro-batch and several adapters -> each adapter's log-probs, from one base model and one look at the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from orpo_ray.data.packing import PairBatch
from orpo_ray.errors import UserError
from orpo_ray.model.loading import without_adapters
from orpo_ray.model.stacked_lora import AdapterStack
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.pair_model import PairModel

ALONE = "train them one after another"


class MultiAdapterModel:
    """Runs adapters of a `PairModel` side by side: its packed row in one copy for each.

    Adapters run in groups that together have no more tokens than one model would have at once, so that memory for
    activations does not grow with their number.

    Args:
        model: with one adapter; others may be added before `stack`.
        tokens_at_once: most tokens of all copies of a row together (`optim.tokens_per_microbatch`). A copy that is
            longer runs alone.

    Raises:
        UserError: the model's adapters cannot run side by side.
    """

    def __init__(self, model: PairModel, tokens_at_once: int) -> None:
        if (why := why_not_side_by_side(model)) is not None:
            raise UserError(f"runs cannot share this model: {why}", fix=ALONE)
        self.model, self._tokens_at_once = model, tokens_at_once
        self._stack: AdapterStack | None = None

    def stack(self) -> None:
        """Let adapted layers run all adapters that the model has now. To be called once."""
        self._stack = AdapterStack(self.model.model)

    def drop(self, name: str) -> None:
        """Free the weights of an adapter that runs no longer."""
        assert self._stack is not None, "adapters are not stacked yet"
        self._stack.drop(name)

    def groups(self, batch: PairBatch, names: Sequence[str]) -> Iterator[dict[str, PairLogps]]:
        """Run a micro-batch through some adapters.

        Args:
            batch: on the model's device.
            names: of the adapters.

        Yields:
            Log-probs by adapter, for one group after another. Whoever wants gradients runs backward for a group before
            it takes the next.
        """
        images = self.model.encode_images(batch)
        for group in divided(names, batch.input_ids.numel(), self._tokens_at_once):
            copies = len(group)
            assert self._stack is not None, "adapters are not stacked yet"
            self._stack.use(group)
            row = batch.repeated(
                copies, self.model.family.repeated_images(batch.images, copies, batch.input_ids.numel())
            )
            logps = self.model.logps(row, None if images is None else images.repeated(copies))
            yield dict(zip(group, logps.split(copies), strict=True))


class OneAdapter(nn.Module):
    """One of the adapters, as the only one: what an engine trains, with the names that a run of its own has.

    Args:
        adapters: the model of all.
        name: of this one.
    """

    def __init__(self, adapters: MultiAdapterModel, name: str) -> None:
        super().__init__()
        self.model = adapters.model.model  # buffers keep their names
        self._adapters, self._name = adapters, name

    def forward(self, batch: PairBatch) -> PairLogps:
        """Run a micro-batch through this adapter alone."""
        (logps,) = self._adapters.groups(batch, [self._name])
        return logps[self._name]


def why_not_side_by_side(model: PairModel) -> str | None:
    """Why adapters of a model cannot run side by side; None if they can."""
    base = without_adapters(model.model)
    if why := model.family.why_not_beside_others(base.config):
        return why
    if model.layout != "shared_prefix":
        return "model.attention is concatenated"
    head = base.get_output_embeddings()
    inside = {id(weight) for weight in head.parameters()}
    for name, weight in base.named_parameters():
        if weight.requires_grad and (id(weight) in inside or not name.startswith(model.family.language)):
            return f"{name} is trained, which lies outside the layers of the language model"
    return None


def divided(names: Sequence[str], tokens: int, tokens_at_once: int) -> list[list[str]]:
    """Divide adapters into groups of about equal size.

    Args:
        names: of the adapters.
        tokens: of one copy of the row.
        tokens_at_once: most tokens of a group.
    """
    most = max(1, tokens_at_once // tokens)
    groups = -(-len(names) // most)
    return [
        list(names[number * len(names) // groups : (number + 1) * len(names) // groups]) for number in range(groups)
    ]
