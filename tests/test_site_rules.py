"""Site rules: pure choices from a list of sites."""

import pytest

from meansparse_cli.errors import SiteError
from meansparse_cli.sites.find import Site
from meansparse_cli.sites.rules import chosen_by, index_ranges, parse_rule, select_sites


def site(index: int, name: str, *, gate: bool = False, after: bool = False, main: bool = False) -> Site:
    return Site(
        index,
        name,
        name.split("#")[0],
        "module",
        "ReLU",
        "channels-first",
        1,
        8,
        (8, 4, 4),
        gate,
        after_addition=after,
        main_path=main,
    )


SITES = [
    site(0, "stem"),
    site(1, "layer1.0.act1", main=True),
    site(2, "layer1.0.se.act", gate=True, main=True),
    site(3, "layer1.0.act2", after=True),
    site(4, "layer2.0.relu#0", main=True),
    site(5, "layer2.0.relu#1", after=True),
    site(6, "head"),
]


@pytest.mark.parametrize(
    ("rule", "indices"),
    [
        ("all", [0, 1, 3, 4, 5, 6]),
        ("main-path", [1, 4]),
        ("after-addition", [3, 5]),
        ("first:3", [0, 1, 3]),
        ("last:2", [5, 6]),
        ("single:3", [3]),
        ("3", [3]),
        ("1-4", [1, 3, 4]),
        ("1:4", [1, 3, 4]),
        ("5-5", [5]),
        ("5,0,3", [0, 3, 5]),
        ("head", [6]),
        ("layer1.*", [1, 3]),
        ("*.act?", [1, 3]),
        ("layer2.0.relu", [4, 5]),
        ("layer2.0.relu#1", [5]),
        ("first:1, after-addition ,head,0", [0, 3, 5, 6]),
    ],
)
def test_a_rule_chooses(rule: str, indices: list[int]) -> None:
    chosen = select_sites(SITES, rule, include_gates=False)
    assert [s.index for s in chosen] == indices
    assert all(s is SITES[s.index] for s in chosen)  # the site itself: its name finds its statistics


def test_gates_only_where_asked_for() -> None:
    assert [s.index for s in select_sites(SITES, "1-4")] == [1, 2, 3, 4]
    assert [s.index for s in select_sites(SITES, "first:3")] == [0, 1, 2]
    for rule in ("2", "single:2", "layer1.0.se.act", "*.se.*"):
        with pytest.raises(SiteError, match="--include-gates"):
            select_sites(SITES, rule, include_gates=False)
    with pytest.raises(SiteError, match="every activation of this model is a gate"):
        select_sites(SITES[2:3], "all", include_gates=False)


def test_the_part_that_chose_is_named() -> None:
    assert chosen_by(SITES, "first:2,after-addition,0", include_gates=False) == {
        0: "first:2",
        1: "first:2",
        3: "after-addition",
        5: "after-addition",
    }


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("7", r"indices are 0-1, 3-6"),
        ("single:9", r"indices are 0-1, 3-6"),
        ("5-9", r"indices are 0-1, 3-6"),
        ("first:7", "only 6 sites"),
        ("last:7", "only 6 sites"),
        ("layer1.0.act3", r"no site has such a name\ndid you mean layer1.0.act2"),
        ("main_path", "did you mean main-path"),
        ("layer9.*", "meansparse sites"),
        ("all,nothing", "--sites nothing"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(rule: str, says: str) -> None:
    with pytest.raises(SiteError, match=says):
        select_sites(SITES, rule, include_gates=False)


def test_a_family_this_model_lacks() -> None:
    with pytest.raises(SiteError, match="after-addition: this model has no such site"):
        select_sites(SITES[:2], "after-addition")


def test_a_checkpoint_of_some_sites_keeps_their_indices() -> None:
    some = [SITES[3], SITES[5]]
    assert select_sites(some, "single:5") == [SITES[5]]
    assert select_sites(some, "first:1") == [SITES[3]]
    with pytest.raises(SiteError, match="indices are 3, 5"):
        select_sites(some, "4")


def test_rules_are_read_before_there_is_a_model() -> None:
    assert parse_rule(" first:3 , 7-12,") == "first:3,7-12"
    assert parse_rule([0, "layer1.*"]) == "0,layer1.*"
    assert parse_rule(4) == "4"
    for wrong, says in [
        ("", "empty"),
        (",", "empty"),
        ("first:0", "from 1 up"),
        ("single:x", "whole number"),
        ("last:", "whole"),
        ("9-5", "empty range"),
    ]:
        with pytest.raises(ValueError, match=says):
            parse_rule(wrong)


def test_indices_in_short() -> None:
    assert index_ranges([SITES[i] for i in (0, 1, 2, 4, 6)]) == "0-2, 4, 6"
