"""Configs are strict, complete, round-trip, and report every mistake with its path."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from raytune_llama.config.settings import (
    PLACEMENT,
    ConfigError,
    describe,
    find_differences,
    from_dict,
    identity,
    load,
    override,
    settings,
    to_dict,
    to_yaml,
    write_yaml,
)


@settings
class Adapter:
    """Which weights are adapted."""

    rank: Annotated[int, Field(ge=1)] = 8
    """Rank of the update."""

    alpha: float = 16.0
    """Scale of the update."""

    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Last parts of module names."""

    @pydantic.model_validator(mode="after")
    def _relations(self) -> Self:
        if self.alpha < self.rank:
            raise ValueError(f"alpha: got {self.alpha}, wanted at least rank")
        return self


@settings
class Source:
    """One corpus."""

    path: Path
    """Where it is."""

    kind: Literal["txt", "json"] = "txt"
    """Its format."""

    cache_dir: Path | None = Path("cache")
    """Where its parts go; null keeps none."""


@settings
class Cluster:
    """Where the run is carried out."""

    num_workers: Annotated[int, Field(ge=0)] = 1
    """Processes; 0 is in this one."""


@settings
class Run:
    """A run of the tests."""

    model: str
    """Model directory."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""

    packed: bool = True
    """Whether sequences hold several documents."""

    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Sequences at once."""

    adapter: Adapter | None = None
    """null trains all weights."""

    sources: tuple[Source, ...] = ()
    """Corpora, in order."""

    cluster: Annotated[Cluster, PLACEMENT] = Cluster()
    """Where."""

    save_every_steps: Annotated[int | None, PLACEMENT] = None
    """Optimizer steps between checkpoints; null saves at the end only."""

    engine_options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the engine."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def problems_of(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(Run, list(argv))
    return caught.value.problems


def test_load_file_and_overrides_gives_typed_values(path: Path) -> None:
    path.write_text("model: base\nlr: 1e-4\nsources: [{path: a.txt}, {path: b.json}]\n")
    argv = [str(path), "adapter.alpha=32", "adapter.targets=[up, down]", "sources.1.kind=json",
            "save_every_steps=null", "engine_options.zero.stage=2"]  # fmt: skip
    config = load(Run, argv)
    assert config == Run(
        model="base",
        lr=0.0001,
        adapter=Adapter(alpha=32.0, targets=("up", "down")),
        sources=(Source(path=Path("a.txt")), Source(path=Path("b.json"), kind="json")),
        engine_options={"zero": {"stage": 2}},
    )
    assert config.adapter is not None
    assert isinstance(config.adapter.alpha, float)


def test_load_without_file_uses_default_and_overrides_win(path: Path) -> None:
    path.write_text("model: from-default\nlr: 2\n")
    assert load(Run, ["lr=3"], default=path) == Run(model="from-default", lr=3.0)


def test_load_named_file_replaces_the_default_whole(tmp_path: Path, path: Path) -> None:
    path.write_text("model: from-default\nlr: 2\n")
    # Directories of trials hold equal signs; that makes no override of a file name.
    named = tmp_path / "lr=3" / "run.yaml"
    named.parent.mkdir()
    named.write_text("model: named\n")
    assert load(Run, [str(named)], default=path) == Run(model="named")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+.0001", "1e-04"])
def test_float_forms_are_numbers(text: str) -> None:
    assert load(Run, ["model=m", f"lr={text}"]).lr == 0.0001


@pytest.mark.parametrize(
    ("argument", "path"),
    [
        ("packed=yes", "packed"), ("packed=1", "packed"), ('packed="true"', "packed"),
        ("save_every_steps=1.0", "save_every_steps"), ("save_every_steps=1.5", "save_every_steps"),
        ("save_every_steps=true", "save_every_steps"), ('save_every_steps="5"', "save_every_steps"),
        ('lr="1e-4"', "lr"), ("lr=true", "lr"), ("lr=.nan", "lr"), ("lr=.inf", "lr"),
        ("lr=0", "lr"), ("lr=null", "lr"), ("model=5", "model"), ("model=[a]", "model"),
        ("sources=a", "sources"), ("sources=[{path: 3}]", "sources.0.path"),
        ("adapter.rank=0", "adapter.rank"), ("adapter=lora", "adapter"),
        ("cluster=null", "cluster"), ("micro_batch=some", "micro_batch"),
    ],
)  # fmt: skip
def test_wrong_value_is_refused_with_its_path(argument: str, path: str) -> None:
    (problem,) = problems_of("model=m", argument)
    assert problem.startswith(f"{path}: got ")


def test_union_is_one_problem_that_names_all_choices() -> None:
    assert problems_of("model=m", "micro_batch=1.5") == [
        "micro_batch: got 1.5, wanted a valid integer or 'auto'"
    ]


@pytest.mark.parametrize(
    ("argument", "path", "meant"),
    [
        ("packd=true", "packd", "packed"),
        ("adapter.rnk=4", "adapter.rnk", "adapter.rank"),
        ("sources=[{path: a, knd: txt}]", "sources.0.knd", "sources.0.kind"),
        ("rank=4", "rank", "adapter.rank"),
        ("rnk=4", "rnk", "adapter.rank"),
        ("adapter.lr=1", "adapter.lr", "lr"),
    ],
)
def test_unknown_key_names_the_nearest_field(argument: str, path: str, meant: str) -> None:
    (problem,) = problems_of("model=m", argument)
    assert problem == f"{path}: no such field; did you mean {meant}?"


def test_unknown_key_near_nothing_lists_the_fields() -> None:
    (problem,) = problems_of("model=m", "cluster.zzz=1")
    assert problem == "cluster.zzz: no such field; Cluster has num_workers"


def test_all_mistakes_are_reported_together(path: Path) -> None:
    path.write_text(
        "packed: yes\nlr: 1\nlr: 2\nmodl: x\n5: x\n"
        "adapter: {rank: 9, alpha: 1}\nsources: [{kind: pdf}]\n"
    )
    problems = problems_of(str(path), "--fast", "lr=", "lr=[", "sources.3.kind=txt", "packed.x=1")
    starts = [
        f"{path}:3: duplicate key 'lr'", f"{path}:5: the key 5", "--fast: ", "lr: got no value",
        "lr: '[' is not YAML", "sources.3.kind: ", "packed.x: packed is 'yes'",
        "model: required", "packed: got 'yes'", "adapter: alpha: got 1.0", "sources.0.path: req",
        "sources.0.kind: got 'pdf'", "modl: no such field",
    ]  # fmt: skip
    assert len(problems) == len(starts)
    for start, problem in zip(starts, problems, strict=True):
        assert problem.startswith(start)
        assert "\n" not in problem


def test_unusable_file_and_bad_override_are_both_reported(path: Path) -> None:
    assert problems_of(str(path), "x")[0] == f"{path}: no such file"
    path.write_text("a: [1")
    file_problem, override_problem = problems_of(str(path), "no-override")
    assert file_problem.startswith(f"{path}:1: not YAML")
    assert override_problem.startswith("no-override: ")


def test_bad_override_alone_is_refused() -> None:
    assert len(problems_of("model=m", "lr=")) == 1
    assert len(problems_of("model=m", "--verbose")) == 1


def test_override_below_a_null_makes_the_mapping(path: Path) -> None:
    path.write_text("model: m\nadapter: null\n")
    assert load(Run, [str(path), "adapter.rank=4"]).adapter == Adapter(rank=4)


def test_override_below_a_number_that_may_be_a_mapping_makes_the_mapping(path: Path) -> None:
    @settings
    class Limits:
        """Limits."""

        low: int = 0
        """Low."""

        high: int
        """High."""

    @settings
    class Sizes:
        """Sizes."""

        size: int | Limits = 1
        """One size, or its limits."""

    path.write_text("size: 3\n")
    loaded = load(Sizes, [str(path), "size.low=2", "size.high=5"])
    assert loaded == override(Sizes(), {"size.low": 2, "size.high": 5})
    assert loaded.size == Limits(low=2, high=5)
    with pytest.raises(ConfigError, match=r"size\.mid: size is 1, which has no field 'mid'"):
        override(Sizes(), {"size.mid": 2})


def test_nested_validator_may_report_several_problems() -> None:
    @settings
    class Inner:
        """Inner."""

        low: int = 0
        """Low."""

        @pydantic.model_validator(mode="after")
        def _relations(self) -> Self:
            if self.low < 0:
                raise ConfigError(["low: too low", "high: too high"])
            return self

    @settings
    class Outer:
        """Outer."""

        inner: Inner = Inner()
        """Inner."""

    with pytest.raises(ConfigError) as caught:
        from_dict(Outer, {"inner": {"low": -1}})
    assert caught.value.problems == ["inner.low: too low", "inner.high: too high"]


def test_settings_are_frozen_and_keyword_only() -> None:
    run = Run(model="m")
    with pytest.raises(AttributeError):
        run.model = "other"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(pydantic.ValidationError):
        Run("m")  # pyright: ignore[reportCallIssue]
    assert hash(Adapter()) == hash(Adapter())


def test_override_replaces_and_validates_again() -> None:
    run = Run(model="m", adapter=Adapter(rank=4, alpha=4.0))
    changed = override(run, {"adapter.rank": 2, "lr": 0.5, "adapter.targets": ("up",)})
    assert changed == Run(model="m", lr=0.5, adapter=Adapter(rank=2, alpha=4.0, targets=("up",)))
    assert run.lr == 1e-4
    assert override(run, {"adapter": Adapter()}).adapter == Adapter()
    with pytest.raises(ConfigError) as caught:
        override(run, {"adapter.rank": 5, "cluster.workers": 1, "model.x": 1, "lr": object()})
    assert "model.x" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        override(run, {"adapter.rank": 5, "cluster.workers": 1})
    assert caught.value.problems == [
        "adapter: alpha: got 4.0, wanted at least rank",
        "cluster.workers: no such field; did you mean cluster.num_workers?",
    ]


def test_identity_leaves_out_placement_at_any_depth() -> None:
    run = Run(model="m", adapter=Adapter(), sources=(Source(path=Path("a")),))
    found = identity(run)
    assert found["adapter"] == {"rank": 8, "alpha": 16.0, "targets": ["q_proj", "v_proj"]}
    assert found["sources"] == [{"path": "a", "kind": "txt", "cache_dir": "cache"}]
    assert not {"cluster", "save_every_steps"} & set(found)
    moved = override(run, {"cluster.num_workers": 8, "save_every_steps": 5})
    assert identity(moved) == found
    assert identity(override(run, {"adapter.rank": 1})) != found


def test_differences_name_path_and_both_values() -> None:
    run = Run(model="m", sources=(Source(path=Path("a")), Source(path=Path("b"))))
    changes = {"lr": 1.0, "sources.1.kind": "json", "engine_options": {"x": 1}}
    assert find_differences(to_dict(run), to_dict(override(run, changes))) == [
        "lr: 0.0001 -> 1.0",
        "sources.1.kind: 'txt' -> 'json'",
        "engine_options: {} -> (not given)",
        "engine_options.x: (not given) -> 1",
    ]


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
texts = st.text()
runs = st.builds(
    Run,
    model=texts,
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    packed=st.booleans(),
    micro_batch=st.just("auto") | st.integers(min_value=1),
    adapter=st.none()
    | st.builds(
        Adapter,
        rank=st.integers(1, 9),
        alpha=st.floats(9, 1e308),
        targets=st.lists(texts, max_size=3).map(tuple),
    ),
    sources=st.lists(
        st.builds(Source, path=texts.map(Path), kind=st.sampled_from(["txt", "json"])), max_size=3
    ).map(tuple),
    cluster=st.builds(Cluster, num_workers=st.integers(min_value=0)),
    save_every_steps=st.none() | st.integers(),
    engine_options=st.dictionaries(texts, plain_values, max_size=3),
)


@given(runs)
def test_config_round_trips_through_dict_and_yaml(
    tmp_path_factory: pytest.TempPathFactory, run: Run
) -> None:
    assert from_dict(Run, to_dict(run)) == run
    assert override(run, {}) == run
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    write_yaml(run, path)
    assert load(Run, [str(path)]) == run


def test_infinity_where_anything_goes_survives_the_round_trip() -> None:
    run = Run(model="m", engine_options={"limits": [float("inf")]})
    assert from_dict(Run, to_dict(run)) == override(run, {}) == run


def test_written_yaml_is_complete_in_order_and_leaves_no_temporary(tmp_path: Path) -> None:
    run = Run(model="m", adapter=Adapter(targets=("上", "up")))
    write_yaml(run, tmp_path / "run.yaml")
    text = (tmp_path / "run.yaml").read_text(encoding="utf-8")
    assert text == to_yaml(run)
    tops = [line.partition(":")[0] for line in text.splitlines() if line[0].isalpha()]
    assert tops == list(to_dict(run))
    assert "上" in text
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_help_describes_every_field_and_exits_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(Run, ["x.yaml", "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.endswith(describe(Run))
    lines = describe(Run).splitlines()
    assert "model: string (required)" in lines
    assert "lr: float > 0 (default 0.0001)" in lines
    assert "micro_batch: int >= 1 or 'auto' (default \"auto\")" in lines
    assert 'adapter.targets: list of string (default ["q_proj", "v_proj"])' in lines
    assert "sources.N.kind: 'txt' or 'json' (default \"txt\")" in lines
    assert "save_every_steps: int or null (default null, may change on resume)" in lines
    assert "    Optimizer steps between checkpoints; null saves at the end only." in lines
