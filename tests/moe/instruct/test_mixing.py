from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.instruct.encoded import demonstration_shares
from moe.instruct.mixing import ExampleDraws, Task, choose_tasks, sampled_shares, task_shares

PAPER = {
    "crossfit": 4,
    "exmix": 2,
    "flan": 20,
    "super_natural_instructions": 25,
    "promptsource": 45,
    "t5": 2,
    "unified_skg": 2,
}


def paper_tasks() -> list[Task]:
    """Three hundred tasks of the seven collections and of reasoning, from 10 to 100,000 examples."""
    random = np.random.default_rng(0)
    tasks = []
    for benchmark, count in zip((*PAPER, "cot"), (40, 10, 30, 120, 60, 7, 20, 13), strict=True):
        for number in range(count):
            size = int(10 ** random.uniform(1, 5))
            tasks.append(Task(f"{benchmark}/{number}", benchmark, f"category {number % 9}", size))
    return tasks


def benchmark_share(tasks: list[Task], shares: list[float], benchmark: str) -> float:
    return sum(share for task, share in zip(tasks, shares, strict=True) if task.benchmark == benchmark)


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=20), st.none() | st.integers(1, 10**6))
def test_shares_sum_to_one_under_any_cap_and_capped_tasks_are_equal(sizes: list[int], eta: int | None) -> None:
    tasks = [Task(str(i), "ab"[i % 2], "c", size) for i, size in enumerate(sizes)]
    shares = task_shares(tasks, eta=eta)
    assert sum(shares) == pytest.approx(1.0)
    for a, share in zip(sizes, shares, strict=True):
        assert share == pytest.approx(min(a, eta or a) / sum(min(b, eta or b) for b in sizes))


def test_the_papers_mixture_is_sampled_as_intended() -> None:
    """eta = 4096, 4/2/20/25/45/2/2, 1 % reasoning from PromptSource: after 20,000 draws, and at any place of them."""
    tasks = paper_tasks()
    shares = task_shares(tasks, eta=4096, benchmark_shares=PAPER, extra_shares={"cot": 0.01})
    intended = {name: share / 100 for name, share in PAPER.items()} | {"cot": 0.01}
    intended["promptsource"] -= 0.01
    for name, share in intended.items():
        assert benchmark_share(tasks, shares, name) == pytest.approx(share)
    own = [(task, share) for task, share in zip(tasks, shares, strict=True) if task.benchmark == "flan"]
    capped = sum(min(task.size, 4096) for task, _ in own)
    assert [share for _, share in own] == pytest.approx([0.2 * min(task.size, 4096) / capped for task, _ in own])

    bounds = np.concatenate([[0], np.cumsum([task.size for task in tasks])])
    draws = ExampleDraws(bounds, shares, seed=3)
    first, count = 100_000, 20_000
    drawn = draws.draw(first, count)
    of = np.searchsorted(bounds, drawn, side="right") - 1
    counts = np.bincount(of, minlength=len(tasks))
    # each task is within 2 draws and each benchmark within as many as it has tasks (moe.data.sampling)
    assert np.abs(counts - np.array(shares) * count).max() < 3
    rows = sampled_shares([t.benchmark for t in tasks], shares, counts, counts * 2.0, counts * 1.0)
    assert {row.name: row.intended for row in rows} == pytest.approx(intended)
    assert all(abs(row.sampled - row.intended) < 0.003 for row in rows), rows
    assert sum(row.sampled for row in rows) == pytest.approx(1.0)


def test_draws_are_a_function_of_seed_and_place() -> None:
    bounds = np.array([0, 3, 10, 30])
    draws = ExampleDraws(bounds, [0.5, 0.2, 0.3], seed=1)
    whole = draws.draw(0, 400)
    again = ExampleDraws(bounds, [0.5, 0.2, 0.3], seed=1)
    assert np.concatenate([again.draw(250, 150), again.draw(0, 250)]).tolist() == [*whole[250:], *whole[:250]]
    assert ExampleDraws(bounds, [0.5, 0.2, 0.3], seed=2).draw(0, 400).tolist() != whole.tolist()
    of_first = whole[whole < 3]  # every example once before any again, in other orders
    epochs = of_first[: len(of_first) // 3 * 3].reshape(-1, 3)
    assert (np.sort(epochs, axis=1) == np.arange(3)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1


def test_extra_shares_come_from_the_largest_one() -> None:
    tasks = [
        Task("a", "flan", "c", 10),
        Task("b", "t5", "c", 30),
        Task("c", "cot", "c", 5),
        Task("d", "dialogue", "c", 5),
    ]
    shares = task_shares(tasks, extra_shares={"cot": 0.02, "dialogue": 0.005})
    assert shares == pytest.approx([0.25, 0.75 - 0.025, 0.02, 0.005])
    assert task_shares(tasks[:3], extra_shares={"cot": 0.0, "dialogue": 0.0}) == pytest.approx([0.25, 0.75, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmark_shares": {"flan": 1}}, "has no share for t5, which the benchmark has"),
        (
            {"benchmark_shares": {"flan": 1, "t5": 1, "exmix": 1}},
            "names exmix, but the training tasks belong to: flan, t5",
        ),
        ({"extra_shares": {"cot": 0.1}}, "tune.extra_shares names cot"),
        ({"extra_shares": {"flan": 0.9}, "benchmark_shares": {"t5": 1, "flan": 1}}, "tune.benchmark_shares names flan"),
        ({"extra_shares": {"flan": 0.5, "t5": 0.5}}, "name all benchmarks"),
    ],
)
def test_shares_that_do_not_fit_the_tasks_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_shares([Task("a", "flan", "c", 10), Task("b", "t5", "c", 30)], **options)


def test_extra_shares_larger_than_any_are_refused() -> None:
    tasks = [Task(name, name, "c", 10) for name in ("a", "b", "c", "d")]
    with pytest.raises(ValueError, match="more than the largest share, that of c"):
        task_shares(tasks, extra_shares={"d": 0.4})


def test_subsets_of_tasks_are_nested_and_keep_the_supervised_ones() -> None:
    tasks = paper_tasks()
    always = ["flan/3", "t5/1"]
    sizes = (16, 64, 256)
    subsets = [set(choose_tasks(tasks, num_tasks=n, always=always, seed=1)) for n in sizes]
    assert [len(subset) for subset in subsets] == list(sizes)
    assert subsets[0] < subsets[1] < subsets[2]
    assert set(always) < subsets[0]
    assert subsets[0] != set(choose_tasks(tasks, num_tasks=16, always=always, seed=2))
    for count in (1, 301):
        with pytest.raises(ValueError, match=rf"tune.num_tasks \({count}\) must be between 2 .*and 300"):
            choose_tasks(tasks, num_tasks=count, always=always)


def test_categories_are_taken_by_size_behind_those_that_are_always_in() -> None:
    tasks = [Task(f"{c}{i}", "b", c, 10) for c, n in (("small", 1), ("large", 5), ("middle", 3)) for i in range(n)]

    def categories(count: int) -> set[str]:
        chosen = choose_tasks(tasks, num_categories=count, always_categories=["small"])
        return {task.category for task in tasks if task.name in chosen}

    assert [categories(n) for n in (1, 2, 3)] == [{"small"}, {"small", "large"}, {"small", "large", "middle"}]
    with pytest.raises(ValueError, match="always_categories names 'none'; there are: large, middle, small"):
        choose_tasks(tasks, num_categories=2, always_categories=["none"])


def test_demonstration_counts_are_those_of_the_paper() -> None:
    """92.5 % and 67.1 % of the examples without any, for exponents 4 and 2 and at most five (Iyer et al. 2022)."""
    assert round(float(demonstration_shares(4.0, 5)[0]), 3) == 0.925
    assert round(float(demonstration_shares(2.0, 5)[0]), 3) == 0.671
    assert demonstration_shares(2.0, 5).sum() == pytest.approx(1.0)
    assert len(demonstration_shares(2.0, 5)) == 6
