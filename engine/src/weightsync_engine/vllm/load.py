"""Puts a version's tensors into a model that serves: by the recorded plan, or as vLLM does it.

The first version of a layout goes vLLM's way, and shows which modules the plan would have brought to the same
bits: those go by the plan from then on, the others never. At each later version one more module goes vLLM's way
and is compared. All ranks take the same way.
"""

import logging
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch

from weightsync_engine.vllm.agreement import all_ranks
from weightsync_engine.vllm.modules import Plan, make_plan
from weightsync_engine.vllm.own import deferred, load_all, load_some, process_embeddings
from weightsync_engine.vllm.plan import Place, nbytes
from weightsync_engine.vllm.replay import bind, copy_all, differing
from weightsync_engine.vllm.trace import Trace

log = logging.getLogger("vllm.weightsync")
"""Below vLLM's own logger, whose level and form it takes."""

OUTPUT: Final = "lm_head.weight"
"""The output layer's tensor. Where it is tied to the embedding, trainers publish it or don't, as they like."""

MOST_TO_CHECK: Final = 16
"""A module that takes more tensors than this is not compared again: a layer of experts would cost as much as it
saves."""

MOST_BYTES_TO_CHECK: Final = 256 << 20
"""Nor one that is larger: vLLM's way needs as much memory once more, and there may be no more."""


def is_tied(model_config: Any) -> bool:
    """Is the model's output layer its embedding?"""
    return bool(getattr(model_config.hf_config, "tie_word_embeddings", False))


@dataclass(frozen=True)
class Loaded:
    """How a version came into the model. Bytes are those of parameters (planned) and of tensors given (own)."""

    planned_modules: int
    planned_bytes: int
    copies: int
    own_modules: int
    """Those that vLLM loaded; -1: all of them, nobody counted."""
    own_bytes: int
    seconds: float
    compared: str
    """The module that went both ways and was compared, if any."""
    why_own: str
    """Why vLLM loaded everything; empty where it did not."""

    def __str__(self) -> str:
        took = f"in {self.seconds * 1e3:.1f} ms"
        if self.why_own:
            return f"all {self.own_bytes} bytes loaded by vLLM {took}: {self.why_own}"
        return (
            f"{self.planned_bytes} bytes of {self.planned_modules} modules in {self.copies} copies, "
            f"{self.own_bytes} bytes of {self.own_modules} modules loaded by vLLM {took}"
        )


class Loader:
    """One a worker. ``forbidden``: why no plan may be used in this engine, if so."""

    def __init__(
        self, model: torch.nn.Module, model_config: Any, device: torch.device, forbidden: str = ""
    ) -> None:
        self._model = model
        self._model_config = model_config
        self._device = device
        self._forbidden = forbidden
        self._tied = is_tied(model_config)
        self._layout = ""
        self._plan: Plan | None = None
        self._why = forbidden or "no manifest was checked"
        self._proved = False
        self._loads = 0
        self.last: Loaded | None = None
        """How the last version came in."""

    @property
    def plan(self) -> Plan | None:
        """What is known of the present layout; not ``proved``: not yet used."""
        return self._plan

    def knows(self, layout: str) -> bool:
        """Is the plan for ``layout`` still good?"""
        return self._layout == layout and self._plan is not None and self._plan.holds(self._model)

    def record(self, layout: str, found: Trace) -> None:
        """Take the trace of a manifest that is not refused. Raises nothing that a plan may be wrong about."""
        self._layout, self._plan, self._proved = layout, None, False
        if self._forbidden:
            return
        if getattr(self._model, "_do_torchao_reload", False):
            self._why = "torchao reloads the model in a way of its own"
            return
        self._plan = make_plan(self._model, found, deferred(self._model))
        self._why = "the first version of a layout"

    def forget(self, why: str) -> None:
        """Use no plan until the next manifest."""
        self._layout, self._plan, self._proved, self._why = "", None, False, self._forbidden or why

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Loaded:
        """Apply a version; ``tensors`` must be contiguous, on the host or on the model's device.

        Every rank calls it at the same time. Raises what a loader raises; the model is then neither the old nor
        the new one.
        """
        began = time.perf_counter()
        # Tied: two tensors into one parameter, and the later one would win, whichever that is.
        given = {name: t for name, t in tensors if not (self._tied and name.endswith(OUTPUT))}
        self._loads += 1
        plan = self._plan
        if plan is not None and not plan.holds(self._model):
            self.forget("the model's memory is not what the plan was made for")
            plan = None
        if all_ranks(plan is not None and self._proved) and plan is not None:
            loaded = self._by_plan(plan, given, began)
            if loaded is None:
                loaded = self._all(given, began)
        else:
            why = self._why if plan is None or not self._proved else "another rank has no plan"
            self._why = why
            loaded = self._all(given, began)
            if plan is not None and not self._proved:
                self._prove(plan, given)
        self.last = loaded
        log.info("weightsync: %s", loaded)
        return loaded

    def _all(self, given: dict[str, torch.Tensor], began: float) -> Loaded:
        load_all(self._model, self._model_config, given.items())
        self._settle()
        total = sum(tensor.nbytes for tensor in given.values())
        return Loaded(0, 0, 0, -1, total, time.perf_counter() - began, "", self._why)

    def _by_plan(self, plan: Plan, given: dict[str, torch.Tensor], began: float) -> Loaded | None:
        """None if some rank's plan was wrong; then it is dropped, and everything has to be loaded again."""
        compared = self._choose(plan)
        trouble: Exception | None = None
        right, copies, own = False, 0, plan.loaded
        layers = [*plan.slow, *([compared] if compared else [])]
        try:
            pairs = bind(plan.copies, given, self._parameters(plan))
            copies = len(pairs)
            copy_all(pairs)
            own |= plan.names[compared] if compared else frozenset()
            modules = dict(self._model.named_modules())
            fed = [(name, tensor) for name, tensor in given.items() if name in own]
            load_some(self._model, self._model_config, [modules[name] for name in layers], fed)
            if self._device.type == "cpu":
                process_embeddings(self._model)
            self._settle()
            right = not differing([pair for pair in pairs if pair.place.module == compared])
        except Exception as error:
            trouble = error
        # Before anything is raised: the other ranks wait in here.
        if not all_ranks(right):
            if trouble is not None:
                raise trouble
            self.forget(
                f"{compared} differed from what vLLM loads" if not right else "another rank's differed"
            )
            log.warning("weightsync: the plan is dropped, everything is loaded by vLLM: %s", self._why)
            return None
        return Loaded(
            len(plan.planned),
            nbytes(plan.copies),
            copies,
            len(layers),
            sum(tensor.nbytes for name, tensor in given.items() if name in own),
            time.perf_counter() - began,
            compared,
            "",
        )

    def _prove(self, plan: Plan, given: dict[str, torch.Tensor]) -> None:
        """Keep of the plan what gives the very bits that vLLM has just loaded. Changes no parameter."""
        try:
            for module in sorted(differing(bind(plan.copies, given, self._parameters(plan)))):
                plan = plan.without(module, "vLLM keeps it in another form than it is loaded in")
        except Exception as error:
            log.warning("weightsync: no plan can be used", exc_info=True)
            self.forget(f"the plan could not be compared ({error})")
            return
        self._plan, self._proved = plan, plan.holds(self._model)
        log.info(
            "weightsync: next time %d bytes of %d modules are copied by the plan; vLLM loads %d modules: %s",
            nbytes(plan.copies),
            len(plan.planned),
            len(plan.slow),
            "; ".join(sorted(set(plan.slow.values()))) or "none",
        )

    def _choose(self, plan: Plan) -> str:
        """A module to compare; the same on all tensor parallel ranks."""
        sizes = dict.fromkeys(plan.planned, 0)
        for copy in plan.copies:
            sizes[copy.target.module] += copy.nbytes
        small = [
            name
            for name, size in sizes.items()
            if size <= MOST_BYTES_TO_CHECK and len(plan.names[name]) <= MOST_TO_CHECK
        ]
        return random.Random(self._loads).choice(small) if small else ""

    def _parameters(self, plan: Plan) -> dict[Place, torch.Tensor]:
        modules = dict(self._model.named_modules())
        found = {}
        for name in plan.planned:
            for own, parameter in modules[name]._parameters.items():
                if parameter is not None:
                    found[Place(name, own)] = parameter.data
        return found

    def _settle(self) -> None:
        if self._device.type != "cpu":
            # Copies may still be under way, and the memory that they read from goes when this returns.
            torch.accelerator.synchronize()
