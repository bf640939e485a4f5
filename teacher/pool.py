"""A pool of Ray actors that work through shards: one that dies is replaced, and its shard goes to another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from data.manifest import Shard
from pipeline.stage import StageError

_ATTEMPTS = 4  # at a shard: the actors may be preempted, but a shard that kills them all is named
_POLL_S = 1.0  # so that a signal is noticed


def run_on_actors(
    make_actor: Callable[[], ActorHandle], num_actors: int, shards: Sequence[Shard], urls: Sequence[str]
) -> Iterator[Any]:
    """`actor.label(shard, url)` for each shard, in the order in which they end.

    Raises:
        StageError: several actors in a row died at the same shard.
        Whatever `label` raised, at once: an error in code or input is no worker's death.
    """
    queue = [(shard, url, 1) for shard, url in zip(shards, urls, strict=True)][::-1]
    idle = [make_actor() for _ in range(num_actors)]
    running: dict[ray.ObjectRef, tuple[ActorHandle, Shard, str, int]] = {}
    try:
        while queue or running:
            while queue and idle:
                shard, url, attempt = queue.pop()
                actor = idle.pop()
                running[actor.label.remote(shard, url)] = (actor, shard, url, attempt)
            ready, _ = ray.wait(list(running), timeout=_POLL_S)
            for reference in ready:
                actor, shard, url, attempt = running.pop(reference)
                try:
                    result = ray.get(reference)
                except RayActorError as error:
                    _check_attempts(shard, attempt, error)
                    queue.append((shard, url, attempt + 1))
                    idle.append(make_actor())
                    continue
                except RayTaskError as error:
                    raise error.cause if isinstance(error.cause, ValueError) else error from None
                idle.append(actor)
                yield result
    finally:
        for actor in [*idle, *(entry[0] for entry in running.values())]:
            ray.kill(actor)


def _check_attempts(shard: Shard, attempt: int, error: RayActorError) -> None:
    if attempt >= _ATTEMPTS:
        raise StageError(
            f"{shard.url}: {attempt} labeling workers died at this shard, one after another; look for memory limits "
            f"(label.batch_size, label.decode_threads) or an image that crashes its decoder. The last death: {error}"
        )
