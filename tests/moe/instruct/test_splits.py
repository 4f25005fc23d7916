from __future__ import annotations

import pytest

from moe.instruct.definition import Splits
from moe.instruct.readers.tasks import Example, TaskInfo
from moe.instruct.splits import Role, destination, plan_splits
from tests.moe.instruct.conftest import record


def info(name: str, category: str, source: str = "", **changes: object) -> TaskInfo:
    known = {"splits": ("all",)} | changes
    return TaskInfo(f"b/{name}", "b", category, category, source or name, "task", "MIT", 100, **known)


INFOS = [info(f"t{i}{j}", f"C{i}") for i in range(6) for j in range(4)]


def test_the_three_levels() -> None:
    splits = Splits(
        held_out_categories={"test": ["C0"], "validation": ["C1"]},
        held_out_tasks={"test": ["b/t20"]},
        held_out_instances={"test": ["b/t30"], "validation": ["b/t30"]},
    )
    roles = plan_splits(INFOS, splits, 0).roles
    assert [roles[f"b/t0{j}"] for j in range(4)] == [Role(False, ("test",), 1)] * 4
    assert roles["b/t12"] == Role(False, ("validation",), 1)
    assert roles["b/t20"] == Role(False, ("test",), 2)
    assert roles["b/t30"] == Role(True, ("test", "validation"), 3)
    assert roles["b/t31"] == Role(True, (), None)


def test_numbers_are_drawn_by_the_seed() -> None:
    splits = Splits(
        held_out_categories={"test": 2}, held_out_tasks={"test": 3, "validation": 1}, held_out_instances={"test": 2}
    )
    plans = [plan_splits(INFOS, splits, seed).roles for seed in range(5)]
    for roles in plans:
        levels = [role.level for role in roles.values()]
        assert [levels.count(level) for level in (1, 2, 3)] == [8, 4, 2]
        held = {name[:4] for name, role in roles.items() if role.level == 1}
        assert not held & {name[:4] for name, role in roles.items() if role.trains}
    assert plans[0] == plan_splits(list(reversed(INFOS)), splits, 0).roles
    assert len({str(sorted(roles.items())) for roles in plans}) == 5


def test_no_shared_data_source() -> None:
    infos = [*INFOS, info("copy", "C3", source="t00"), info("free", "C3", source="t31")]
    splits = Splits(held_out_categories={"test": ["C0"]})
    with pytest.raises(ValueError, match=r"share a data source: b/copy and b/t00 \(t00\)"):
        plan_splits(infos, splits, 0)
    plan = plan_splits(infos, Splits(held_out_categories={"test": ["C0"]}, on_shared_source="drop_train"), 0)
    assert plan.removed == {"b/copy": "shares the data source t00 with b/t00, which is held out"}
    assert "b/copy" not in plan.roles
    assert plan.roles["b/free"].trains


def test_level_two_needs_its_category_in_training() -> None:
    infos = [*INFOS, info("alone", "C9")]
    with pytest.raises(ValueError, match="without b/alone, no task of category 'C9' is left for training"):
        plan_splits(infos, Splits(held_out_tasks={"test": ["b/alone"]}), 0)
    for seed in range(20):  # by number, such a task is never drawn
        assert plan_splits(infos, Splits(held_out_tasks={"test": 3}), seed).roles["b/alone"].trains


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (Splits(held_out_categories={"test": ["C7"]}), "there is no 'C7'"),
        (Splits(held_out_tasks={"test": ["b/t9"]}), "there is no 'b/t9'; near are: b/t"),
        (
            Splits(held_out_categories={"test": ["C0"]}, held_out_tasks={"test": ["b/t00"]}),
            "'b/t00' is held out already",
        ),
        (Splits(held_out_categories={"test": 7}), "draws 7, but there are only 6"),
        (Splits(exclude={"b/x": "why"}), "splits.exclude: there is no 'b/x'"),
    ],
)
def test_wrong_names(splits: Splits, message: str) -> None:
    with pytest.raises(ValueError) as error:
        plan_splits(INFOS, splits, 0)
    assert message in str(error.value)


def test_evaluation_only_is_never_trained_on() -> None:
    infos = [*INFOS, info("bbh", "C3", evaluation_only=True)]
    with pytest.raises(ValueError, match="b/bbh is for evaluation only and would be trained on"):
        plan_splits(infos, Splits(), 0)
    assert "b/bbh" not in plan_splits(infos, Splits(exclude={"b/bbh": "canary"}), 0).roles


def test_rendered_examples_cannot_be_held_out_one_by_one() -> None:
    infos = [*INFOS, info("t0", "C3", examples_known=False)]
    with pytest.raises(ValueError, match="b/t0 is already rendered"):
        plan_splits(infos, Splits(held_out_instances={"test": ["b/t0"]}), 0)


def where(role: Role, split: str, number: int = 0, **changes: object) -> str | None:
    example = Example(record(example=f"{number}"), split)
    return destination(info("t", "C", **changes), role, example, Splits(instance_fraction=0.25), 0)


def test_published_test_sets_are_never_trained_on() -> None:
    known = {"splits": ("train", "test")}
    trained, supervised = Role(True, (), None), Role(True, ("test", "validation"), 3)
    assert [where(trained, split, **known) for split in ("train", "test")] == ["train", None]
    assert where(supervised, "test", **known) == "test"
    drawn = [where(supervised, "train", i, **known) for i in range(400)]
    assert set(drawn) == {"train", "validation"}  # validation is missing, so it is drawn; test is there
    assert 70 < drawn.count("validation") < 130
    held_out = Role(False, ("test",), 2)
    assert [where(held_out, split, **known) for split in ("train", "test")] == [None, "test"]
    assert where(Role(False, ("validation",), 1), "test", **known) == "validation"


def test_turns_of_a_dialogue_stay_together() -> None:
    role = Role(True, ("test",), 3)
    for number in range(50):
        splits = {
            destination(info("t", "C"), role, Example(record(example=f"{number}/{turn}"), "all"), Splits(), 0)
            for turn in range(6)
        }
        assert len(splits) == 1


def test_the_test_subset_by_convention_is_trained_on_where_nothing_is_evaluated() -> None:
    known = {"splits": ("train", "test"), "first_are_test": True}
    assert where(Role(True, (), None), "test", **known) == "train"
    assert where(Role(True, ("test",), 3), "test", **known) == "test"
    # of a small task half stays for training, and all of it is evaluated where it is held out
    assert where(Role(True, ("test",), 3), "all", **known) == "train"
    assert where(Role(False, ("test",), 1), "all", **known) == "test"
