from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from coldmerge.core.errors import ConfigError
from coldmerge.demo.folders import Example, split
from coldmerge.demo.plan import Options, _all_but_the_top, _names, make_plan, minilm
from coldmerge.demo.run import silent
from coldmerge.demo.stage import round_policy
from coldmerge.rounds.policy import parse_template
from coldmerge_client.training import models
from coldmerge_client.training.config import TrainConfig


@pytest.mark.parametrize(
    "options",
    [
        Options(rounds=0),
        Options(seeds=0),
        Options(seed=-1),
        Options(seen=("one",)),
        Options(seen=("a", "b"), unseen=("b",)),
        Options(seen=("a b", "c")),
        Options(tiny=True, model=Path("model")),
        Options(keep=Path(__file__).parent),
    ],
)
def test_options_that_cannot_work_are_refused_first(options: Options) -> None:
    with pytest.raises(ConfigError) as caught:
        options.check()
    assert caught.value.code == "demo.bad_options"


def test_nobody_trains_on_what_measures() -> None:
    seen, unseen = ("a", "b", "c"), ("x", "y")
    assert _names(Options(), seen, unseen) == (seen, unseen)
    assert _names(Options(unseen=("b",)), seen, unseen) == (("a", "c"), ("b",))
    assert _names(Options(seen=("a", "x")), seen, unseen) == (("a", "x"), ("y",))
    assert _names(Options(unseen=()), seen, unseen) == (seen, ())


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    texts = [Example(f"a text of kind {n % 2}, number {n}", n % 2) for n in range(40)]
    for name in ("alpha", "beta", "gamma", "delta"):
        split(name, texts, "01", seed=0).save(tmp_path / "sets" / name)
    return tmp_path / "sets"


def test_given_data_is_divided_into_seen_and_unseen(sets: Path, tmp_path: Path) -> None:
    plan = make_plan(Options(data=sets), 0, tmp_path, silent)
    assert [task.name for task in plan.seen] == ["alpha", "beta", "gamma"]
    assert [task.name for task in plan.unseen] == ["delta"]
    chosen = Options(data=sets, seen=("beta", "delta"), unseen=("alpha",))
    plan = make_plan(chosen, 0, tmp_path, silent)
    assert [task.name for task in plan.seen] == ["beta", "delta"]
    assert [task.name for task in plan.unseen] == ["alpha"]
    raw = plan.train_config(plan.seen[1], sets / "delta", seed=7)
    assert TrainConfig.parse(raw).seed == 7001


@pytest.mark.parametrize("seen", [("alpha", "omega"), None])
def test_data_that_is_not_there_is_named(
    sets: Path, tmp_path: Path, seen: tuple[str, ...] | None
) -> None:
    data = sets if seen else tmp_path / "nothing"
    with pytest.raises(ConfigError) as caught:
        make_plan(Options(data=data, seen=seen), 0, tmp_path, silent)
    assert caught.value.code == "demo.no_such_task"


def test_only_the_top_third_of_the_layers_is_trained() -> None:
    patterns = _all_but_the_top(minilm())
    assert patterns == [
        "embeddings.*",
        *(f"encoder.layer.{number}.*" for number in range(4)),
        "pooler.*",
    ]


@pytest.mark.parametrize("organizations", [2, 3, 6, 20])
def test_the_round_policy_is_valid_and_no_single_veto_counts(organizations: int) -> None:
    policy = parse_template(round_policy(organizations), "the demo").policy()
    assert policy.seals_at == organizations
    assert policy.gate is not None
    assert policy.gate.max_vetoes >= 1
    assert policy.gate.min_evaluators <= organizations


def test_heads_of_a_checkpoint_are_not_among_what_is_frozen(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with models.quiet():
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    patterns = _all_but_the_top(tmp_path)
    assert "bert.encoder.layer.1.*" in patterns
    assert "bert.embeddings.word_embeddings.weight" in patterns
    body = models.load(transformers.AutoModel, tmp_path)
    frozen = models.Names(body, tmp_path).frozen(patterns)
    assert {name.split(".")[2] for name in frozen if name.startswith("encoder")} == {"0", "1"}
