"""How far the host may be ahead of the devices."""

import collections

import jax

from convstem_jax.step import PyTree

AHEAD = 8  # calls; on 2 CPU cores, which input needs too, fewer cost some percent


class Lead:
    """Keeps the host at most `AHEAD` calls ahead of the devices.

    JAX itself lets it be 32 ahead. Each of these would hold its batch in the devices' memory, and
    a request to stop would wait for all of them.
    """

    def __init__(self):
        self._under_way = collections.deque()

    def add(self, result: PyTree) -> None:
        """Takes the newest call's result, and waits for that of the call `AHEAD` calls before it.

        Args:
            result: arrays that no later call is given to overwrite.
        """
        self._under_way.append(result)
        if len(self._under_way) > AHEAD:
            jax.block_until_ready(self._under_way.popleft())
