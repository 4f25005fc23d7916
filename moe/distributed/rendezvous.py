"""How the processes of one attempt find each other despite the traces of an earlier attempt.

torchrun keeps one store across restarts (torch 2.13, without TORCH_DISABLE_SHARE_RDZV_TCP_STORE), and gloo writes its
addresses there under the same keys each time: a restarted rank that reads before the others have written connects to
dead processes. So the ranks first agree on a name that no earlier attempt can have used, and keep everything under it.
"""

from __future__ import annotations

import json
import time
import uuid

import torch.distributed as dist

_POLL_SECONDS = 0.02


def agree_on_attempt(store: dist.Store, rank: int, size: int, timeout_seconds: float) -> dist.Store:
    """`store` under a prefix that all `size` ranks of this attempt know and no earlier attempt used.

    Every rank says hello with a unique name. Rank 0 welcomes the names it sees, and again whenever one has changed,
    because the first may be from an earlier attempt; it goes on once all have answered its latest welcome.
    Raises ValueError naming the ranks that did not arrive in time.
    """
    until = time.monotonic() + timeout_seconds
    own = uuid.uuid4().hex
    store.set(f"moe/hello/{rank}", own)
    attempt = _host(store, size, until) if rank == 0 else _guest(store, rank, own, until)
    return dist.PrefixStore(f"moe/{attempt}", store)


def _host(store: dist.Store, size: int, until: float) -> str:
    welcomed: list[str | None] = []
    attempt = ""
    while True:
        seen = [_read(store, f"moe/hello/{rank}") for rank in range(size)]
        if seen != welcomed and None not in seen:
            welcomed, attempt = seen, uuid.uuid4().hex
            store.set("moe/welcome", json.dumps([attempt, seen]))
        answered = [rank == 0 or _read(store, f"moe/answer/{rank}") == attempt for rank in range(size)]
        if attempt and all(answered):
            store.set("moe/go", attempt)
            return attempt
        came = [name is not None for name in seen] if None in seen else answered
        absent = [str(rank) for rank in range(size) if not came[rank]]
        _pause(until, f"rank {', '.join(absent)} did not come")


def _guest(store: dist.Store, rank: int, own: str, until: float) -> str:
    while True:
        attempt, names = json.loads(_read(store, "moe/welcome") or '["", []]')
        if rank < len(names) and names[rank] == own:
            store.set(f"moe/answer/{rank}", attempt)
            if _read(store, "moe/go") == attempt:
                return str(attempt)
        _pause(until, "rank 0, or one that it waits for, did not come")


def _read(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _pause(until: float, otherwise: str) -> None:
    if time.monotonic() > until:
        raise ValueError(f"{otherwise} before the timeout (parallel.timeout_seconds); look at what they wrote last")
    time.sleep(_POLL_SECONDS)
