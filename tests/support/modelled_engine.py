"""A model of an engine for random lives: it can die, hang, and come back on its first weights."""

from dataclasses import dataclass

INITIAL, MIXED = "initial", "mixed"


@dataclass
class Engine:
    boot: int = 1
    alive: bool = True
    reachable: bool = True
    weights: object = INITIAL
    paused: bool = False

    @property
    def name(self) -> str:
        return f"b{self.boot}"

    def restart(self) -> None:
        self.boot += 1
        self.alive, self.weights, self.paused = True, INITIAL, False
